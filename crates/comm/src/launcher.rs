//! What the environment says of how this process was started. Starts nothing itself.

use std::fmt;

/// Who started this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Launcher {
    /// Nobody that announces ranks.
    None,
    /// `RANK` and `WORLD_SIZE`, as torchrun sets them.
    RankVariables,
    /// Open MPI's mpirun.
    OpenMpi,
    /// A PMIx server.
    Pmix,
    /// A PMI server, such as MPICH's.
    Pmi,
    /// Slurm's srun.
    Slurm,
}

impl fmt::Display for Launcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "no launcher",
            Self::RankVariables => "RANK and WORLD_SIZE",
            Self::OpenMpi => "Open MPI's mpirun",
            Self::Pmix => "PMIx",
            Self::Pmi => "PMI",
            Self::Slurm => "Slurm",
        })
    }
}

/// What the user asked for on the command line, before anything in the environment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Choice {
    /// Whatever the launcher announces.
    #[default]
    Automatic,
    /// One process that knows of no other, whatever the launcher announces.
    Solo,
    /// MPI, also when nobody announces ranks.
    Mpi,
}

/// How this process was started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// What the user asked for.
    pub choice: Choice,
    /// Who started it.
    pub launcher: Launcher,
    /// Its rank, if announced.
    pub rank: Option<usize>,
    /// Ranks of the job, if announced.
    pub size: Option<usize>,
    /// Its rank among those of this machine, if announced.
    pub local_rank: Option<usize>,
    /// Ranks of this machine, if announced.
    pub local_size: Option<usize>,
    /// Where rank 0 can be reached (`MASTER_ADDR`), if announced.
    pub master_address: Option<String>,
    /// A port there (`MASTER_PORT`), if announced.
    pub master_port: Option<u16>,
    /// Whether that port is taken by torchrun's own store, so that the ranks meet at the next.
    pub port_is_taken: bool,
}

/// Where the ranks of a job meet that no library brings together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meeting {
    /// This rank.
    pub rank: usize,
    /// Ranks of the job.
    pub size: usize,
    /// Name or address of rank 0's machine.
    pub address: String,
    /// The port on which rank 0 awaits the others.
    pub port: u16,
}

/// A process that cannot take its place among the ranks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LaunchError {
    /// A launcher's variable has no sense.
    #[error("environment variable {name} is `{value}`, not {expected}")]
    BadVariable {
        /// The variable.
        name: &'static str,
        /// What it holds.
        value: String,
        /// What it should hold.
        expected: &'static str,
    },
    /// The rank is not one of the job's.
    #[error("rank {rank} of {size} ranks, according to {launcher}: ranks count from 0")]
    RankOutside {
        /// Who announces it.
        launcher: Launcher,
        /// The rank.
        rank: usize,
        /// Ranks of the job.
        size: usize,
    },
    /// Several ranks, but this program cannot speak with others.
    #[error("{} but this program was built without MPI; {}", announced(*launcher, *size), mend_build(*launcher))]
    BuiltWithoutMpi {
        /// Who announces the ranks.
        launcher: Launcher,
        /// Ranks of the job, if announced.
        size: Option<usize>,
    },
    /// MPI sees another number of ranks than the launcher announces: most often 1, so that each
    /// rank would train a model of its own.
    #[error("{} but the MPI library sees {found}; {}", announced(*launcher, Some(*size)), mend(*launcher))]
    OtherWorld {
        /// Who announces the ranks.
        launcher: Launcher,
        /// Ranks announced.
        size: usize,
        /// Ranks that MPI sees.
        found: usize,
    },
}

fn announced(launcher: Launcher, size: Option<usize>) -> String {
    match (launcher, size) {
        (Launcher::None, _) => "MPI was asked for".to_owned(),
        (Launcher::RankVariables, Some(size)) => format!("RANK and WORLD_SIZE announce {size} ranks"),
        (launcher, Some(size)) => format!("{launcher} announces {size} ranks"),
        (launcher, None) => format!("{launcher} announces ranks"),
    }
}

fn mend_build(launcher: Launcher) -> &'static str {
    match launcher {
        Launcher::RankVariables => {
            "set MASTER_ADDR and MASTER_PORT too, as torchrun does, \
             or build it with `cargo build --release --features switchyard-cli/mpi`"
        }
        _ => "build it with `cargo build --release --features switchyard-cli/mpi`",
    }
}

fn mend(launcher: Launcher) -> &'static str {
    match launcher {
        Launcher::RankVariables => {
            "set MASTER_ADDR and MASTER_PORT too, start the ranks with mpirun or srun, \
             or unset RANK and WORLD_SIZE"
        }
        Launcher::Slurm => "start with `srun --mpi=pmix` (`srun --mpi=list` shows what Slurm offers)",
        Launcher::OpenMpi => {
            "start with the mpirun of the MPI library that this program was built with \
             (compare `mpirun --version` with what `ldd` shows)"
        }
        Launcher::Pmix | Launcher::Pmi | Launcher::None => {
            "start with the mpirun of the MPI library that this program was built with, \
             or with `srun --mpi=pmix`"
        }
    }
}

impl Launch {
    /// Reads the environment through `lookup`, in the order: the user's choice, `RANK` and
    /// `WORLD_SIZE`, Open MPI, PMIx, PMI, Slurm.
    ///
    /// # Errors
    /// [`LaunchError`] when a variable has no sense.
    pub fn detect(choice: Choice, lookup: impl Fn(&str) -> Option<String>) -> Result<Self, LaunchError> {
        let environment = Environment(&lookup);
        let mut launch = environment.launcher()?;
        launch.choice = choice;
        if let (Some(rank), Some(size)) = (launch.rank, launch.size)
            && rank >= size
        {
            return Err(LaunchError::RankOutside { launcher: launch.launcher, rank, size });
        }
        Ok(launch)
    }

    /// Whether other ranks are, or may be, part of the job.
    pub fn is_one_of_several(&self) -> bool {
        match self.choice {
            Choice::Solo => false,
            Choice::Mpi => true,
            Choice::Automatic => self.launcher != Launcher::None && self.size.is_none_or(|size| size > 1),
        }
    }

    /// Where to meet the other ranks over TCP: whoever says where rank 0 is, as torchrun does, needs no MPI.
    pub fn meeting(&self) -> Option<Meeting> {
        if self.choice != Choice::Automatic || !self.is_one_of_several() {
            return None;
        }
        let (rank, size, port) = (self.rank?, self.size?, self.master_port?);
        let port = if self.port_is_taken { port.checked_add(1)? } else { port };
        Some(Meeting { rank, size, address: self.master_address.clone()?, port })
    }

    /// Refuses a job that this build cannot join.
    ///
    /// # Errors
    /// [`LaunchError::BuiltWithoutMpi`].
    pub fn require_mpi(&self, built_with_mpi: bool) -> Result<(), LaunchError> {
        if self.is_one_of_several() && !built_with_mpi {
            return Err(LaunchError::BuiltWithoutMpi { launcher: self.launcher, size: self.size });
        }
        Ok(())
    }

    /// Refuses an MPI world that is not the announced one.
    ///
    /// # Errors
    /// [`LaunchError::OtherWorld`].
    pub fn require_world(&self, found: usize) -> Result<(), LaunchError> {
        match self.size {
            Some(size) if size != found => {
                Err(LaunchError::OtherWorld { launcher: self.launcher, size, found })
            }
            _ => Ok(()),
        }
    }
}

struct Environment<'a>(&'a dyn Fn(&str) -> Option<String>);

impl Environment<'_> {
    fn number(&self, name: &'static str) -> Result<Option<usize>, LaunchError> {
        let Some(value) = (self.0)(name) else { return Ok(None) };
        match value.trim().parse() {
            Ok(number) => Ok(Some(number)),
            Err(_) => Err(LaunchError::BadVariable { name, value, expected: "a number" }),
        }
    }

    fn port(&self) -> Result<Option<u16>, LaunchError> {
        const NAME: &str = "MASTER_PORT";
        let Some(value) = (self.0)(NAME) else { return Ok(None) };
        match value.trim().parse() {
            Ok(port) => Ok(Some(port)),
            Err(_) => Err(LaunchError::BadVariable { name: NAME, value, expected: "a port" }),
        }
    }

    fn has(&self, name: &str) -> bool {
        (self.0)(name).is_some()
    }

    fn launcher(&self) -> Result<Launch, LaunchError> {
        let launch = |launcher| Launch {
            choice: Choice::Automatic,
            launcher,
            rank: None,
            size: None,
            local_rank: None,
            local_size: None,
            master_address: None,
            master_port: None,
            port_is_taken: false,
        };
        if self.has("RANK") && self.has("WORLD_SIZE") {
            return Ok(Launch {
                rank: self.number("RANK")?,
                size: self.number("WORLD_SIZE")?,
                local_rank: self.number("LOCAL_RANK")?,
                local_size: self.number("LOCAL_WORLD_SIZE")?,
                master_address: (self.0)("MASTER_ADDR"),
                master_port: self.port()?,
                port_is_taken: (self.0)("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|value| value == "True"),
                ..launch(Launcher::RankVariables)
            });
        }
        if self.has("OMPI_COMM_WORLD_RANK") {
            return Ok(Launch {
                rank: self.number("OMPI_COMM_WORLD_RANK")?,
                size: self.number("OMPI_COMM_WORLD_SIZE")?,
                local_rank: self.number("OMPI_COMM_WORLD_LOCAL_RANK")?,
                local_size: self.number("OMPI_COMM_WORLD_LOCAL_SIZE")?,
                ..launch(Launcher::OpenMpi)
            });
        }
        if self.has("PMIX_RANK") {
            // PMIx has no variable for the size; under Slurm, Slurm's says it.
            return Ok(Launch {
                rank: self.number("PMIX_RANK")?,
                size: self.slurm_tasks()?,
                local_rank: self.number("SLURM_LOCALID")?,
                ..launch(Launcher::Pmix)
            });
        }
        if self.has("PMI_RANK") {
            return Ok(Launch {
                rank: self.number("PMI_RANK")?,
                size: self.number("PMI_SIZE")?,
                local_rank: self.number("MPI_LOCALRANKID")?,
                local_size: self.number("MPI_LOCALNRANKS")?,
                ..launch(Launcher::Pmi)
            });
        }
        match self.slurm_tasks()? {
            Some(size) if size > 1 => Ok(Launch {
                rank: self.number("SLURM_PROCID")?,
                size: Some(size),
                local_rank: self.number("SLURM_LOCALID")?,
                ..launch(Launcher::Slurm)
            }),
            _ => Ok(launch(Launcher::None)),
        }
    }

    /// Tasks of the step that this process is part of. A batch script has `SLURM_NTASKS` and
    /// `SLURM_PROCID` too, but is no step.
    fn slurm_tasks(&self) -> Result<Option<usize>, LaunchError> {
        match self.number("SLURM_STEP_NUM_TASKS")? {
            None if self.has("SLURM_STEP_ID") => self.number("SLURM_NTASKS"),
            tasks => Ok(tasks),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn detect(variables: &[(&str, &str)]) -> Result<Launch, LaunchError> {
        let lookup = |name: &str| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        };
        Launch::detect(Choice::Automatic, lookup)
    }

    fn found(variables: &[(&str, &str)]) -> (Launcher, Option<usize>, Option<usize>, Option<usize>) {
        let launch = detect(variables).expect("it makes sense");
        (launch.launcher, launch.rank, launch.size, launch.local_rank)
    }

    const OMPI: [(&str, &str); 3] =
        [("OMPI_COMM_WORLD_RANK", "3"), ("OMPI_COMM_WORLD_SIZE", "8"), ("OMPI_COMM_WORLD_LOCAL_RANK", "1")];
    const SLURM: [(&str, &str); 5] = [
        ("SLURM_PROCID", "2"),
        ("SLURM_NTASKS", "4"),
        ("SLURM_LOCALID", "0"),
        ("SLURM_STEP_ID", "0"),
        ("SLURM_STEP_NUM_TASKS", "4"),
    ];

    #[test]
    fn launchers_are_told_by_their_variables() {
        assert_eq!(found(&[]), (Launcher::None, None, None, None));
        assert_eq!(found(&OMPI), (Launcher::OpenMpi, Some(3), Some(8), Some(1)));
        assert_eq!(found(&SLURM), (Launcher::Slurm, Some(2), Some(4), Some(0)));
        assert_eq!(
            found(&[("PMI_RANK", "1"), ("PMI_SIZE", "2"), ("MPI_LOCALRANKID", "1")]),
            (Launcher::Pmi, Some(1), Some(2), Some(1))
        );
        assert_eq!(found(&[("PMIX_RANK", "1")]), (Launcher::Pmix, Some(1), None, None));
        let torchrun = [
            ("RANK", "5"),
            ("WORLD_SIZE", "6"),
            ("LOCAL_RANK", "1"),
            ("MASTER_ADDR", "a"),
            ("MASTER_PORT", "29500"),
        ];
        let launch = detect(&torchrun).expect("it makes sense");
        assert_eq!((launch.rank, launch.size, launch.local_rank), (Some(5), Some(6), Some(1)));
        assert_eq!((launch.master_address.as_deref(), launch.master_port), (Some("a"), Some(29500)));
    }

    #[test]
    fn ranks_that_are_told_where_the_first_is_meet_there() {
        let ranks = [("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "a")];
        assert_eq!(detect(&ranks).expect("it makes sense").meeting(), None, "no port");
        let all = [&ranks[..], &[("MASTER_PORT", "29500")]].concat();
        let mut launch = detect(&all).expect("it makes sense");
        let meeting = Meeting { rank: 1, size: 2, address: "a".to_owned(), port: 29500 };
        assert_eq!(launch.meeting(), Some(meeting.clone()));
        for choice in [Choice::Mpi, Choice::Solo] {
            launch.choice = choice;
            assert_eq!(launch.meeting(), None);
        }
        // torchrun's own store listens at the port that it names.
        let torchrun = [&all[..], &[("TORCHELASTIC_USE_AGENT_STORE", "True")]].concat();
        let launch = detect(&torchrun).expect("it makes sense");
        assert_eq!(launch.meeting(), Some(Meeting { port: 29501, ..meeting }));
        let alone = [&[("WORLD_SIZE", "1"), ("RANK", "0")], &all[2..]].concat();
        assert_eq!(detect(&alone).expect("it makes sense").meeting(), None);
    }

    #[test]
    fn the_first_in_the_order_wins() {
        let rank = [("RANK", "0"), ("WORLD_SIZE", "2")];
        let pmix = [("PMIX_RANK", "1")];
        assert_eq!(found(&[&OMPI[..], &rank[..]].concat()).0, Launcher::RankVariables);
        assert_eq!(found(&[&pmix[..], &OMPI[..]].concat()).0, Launcher::OpenMpi);
        assert_eq!(found(&[&SLURM[..], &pmix[..]].concat()), (Launcher::Pmix, Some(1), Some(4), Some(0)));
        // Half of a pair says nothing.
        assert_eq!(found(&[("RANK", "0")]).0, Launcher::None);
    }

    #[test]
    fn a_batch_script_is_no_step() {
        assert_eq!(found(&SLURM[..3]).0, Launcher::None);
        let alone = [
            ("SLURM_PROCID", "0"),
            ("SLURM_NTASKS", "4"),
            ("SLURM_STEP_ID", "0"),
            ("SLURM_STEP_NUM_TASKS", "1"),
        ];
        assert_eq!(found(&alone).0, Launcher::None);
        assert_eq!(found(&SLURM[..4]).2, Some(4));
    }

    #[test]
    fn nonsense_is_refused() {
        assert_eq!(
            detect(&[("RANK", "x"), ("WORLD_SIZE", "2")]).expect_err("no number").to_string(),
            "environment variable RANK is `x`, not a number"
        );
        let outside = detect(&[("RANK", "2"), ("WORLD_SIZE", "2")]).expect_err("outside");
        assert_eq!(
            outside.to_string(),
            "rank 2 of 2 ranks, according to RANK and WORLD_SIZE: ranks count from 0"
        );
    }

    #[test]
    fn jobs_that_cannot_be_joined_name_the_mend() {
        let launch = detect(&SLURM).expect("it makes sense");
        assert_eq!(launch.require_mpi(true), Ok(()));
        assert_eq!(
            launch.require_mpi(false).expect_err("no MPI").to_string(),
            "Slurm announces 4 ranks but this program was built without MPI; build it with `cargo build --release --features switchyard-cli/mpi`"
        );
        assert_eq!(launch.require_world(4), Ok(()));
        let alone = launch.require_world(1).expect_err("alone").to_string();
        assert!(
            alone.starts_with(
                "Slurm announces 4 ranks but the MPI library sees 1; start with `srun --mpi=pmix`"
            )
        );
        let solo = Launch { choice: Choice::Solo, ..launch };
        assert_eq!(solo.require_mpi(false), Ok(()));
        let one = detect(&[("OMPI_COMM_WORLD_RANK", "0"), ("OMPI_COMM_WORLD_SIZE", "1")]).expect("sense");
        assert_eq!(one.require_mpi(false), Ok(()));
        let unknown = detect(&[("PMIX_RANK", "0")]).expect("it makes sense");
        assert!(unknown.require_mpi(false).is_err());
    }
}
