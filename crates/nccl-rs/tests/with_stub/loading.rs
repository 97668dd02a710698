//! Which libraries are taken, and how settings reach them.

use std::fs;

use nccl_rs::{
    Communicator, Config, DataType, DeviceSliceMut, Error, Feature, Library, Origin, ReduceOp, Stream,
    UniqueId, Version,
};
use tempfile::TempDir;

use crate::stub::{LONG, Stub, build, lend};

#[test]
fn a_library_tells_its_version_origin_and_file() {
    let stub = Stub::of(Version::new(2, 30, 7));
    let library = stub.library();
    assert_eq!(library.version(), Version::new(2, 30, 7));
    assert_eq!(library.origin(), &Origin::Path(stub.file.clone()));
    assert_eq!(library.file(), Some(stub.file.clone()));
    assert!(
        format!("{library:?}").starts_with("Library { version: Version { major: 2, minor: 30, patch: 7 }")
    );
}

#[test]
fn the_oldest_library_is_new_enough_and_the_one_before_is_not() {
    assert_eq!(Stub::of(Version::MINIMUM).library().version(), Version::MINIMUM);
    let stub = Stub::of(Version::new(2, 17, 1));
    let error = Library::open(&stub.file).expect_err("it is too old");
    let Error::TooOld { found, .. } = &error else { panic!("{error}") };
    assert_eq!(*found, Version::new(2, 17, 1));
    let text = error.to_string();
    assert!(text.contains("is too old, 2.18.1 is needed") && text.contains("libnccl-copy.so"), "{text}");
}

#[test]
fn a_version_that_cannot_be_asked_for_is_an_error() {
    let stub = Stub::new();
    stub.fail("ncclGetVersion", 3);
    let error = Library::open(&stub.file).expect_err("it was told to fail");
    assert!(error.to_string().starts_with("ncclGetVersion failed: answer 3"), "{error}");
    let stub = Stub::of(Version::new(0, 0, 0));
    let error = Library::open(&stub.file).expect_err("there is no such version");
    assert!(matches!(error, Error::TooOld { .. }), "{error}");
}

#[test]
fn what_is_no_library_is_told_from_what_is_not_there() {
    let directory = TempDir::new().expect("a directory");
    let text_file = directory.path().join("libnccl.so.2");
    fs::write(&text_file, "no library").expect("there is room");
    for (file, expected) in [
        (text_file.as_path(), "file too short"),
        (directory.path().join("missing.so").as_path(), "No such file"),
    ] {
        let error = Library::open(file).expect_err("it cannot be loaded");
        let Error::NotFound { tried } = &error else { panic!("{error}") };
        assert_eq!(tried[0].place, Origin::Path(file.to_owned()));
        assert!(tried[0].problem.contains(expected), "{error}");
    }
}

#[test]
fn functions_that_are_missing_are_named() {
    for symbol in ["ncclGetVersion", "ncclCommSplit"] {
        let directory = TempDir::new().expect("a directory");
        let file = build(directory.path(), &[&format!("-D{symbol}=absent")]);
        let error = Library::open(&file).expect_err("it lacks a function");
        assert_eq!(error, Error::MissingSymbol { symbol, origin: Origin::Path(file) });
        assert!(error.to_string().contains(&format!("it has no `{symbol}`")), "{error}");
    }
}

#[test]
fn functions_that_may_be_missing_are_missed_when_called() {
    let directory = TempDir::new().expect("a directory");
    let file = build(directory.path(), &["-DncclCommRegister=absent"]);
    let library = Library::open(&file).expect("it has what every version has");
    let id = UniqueId::new(&library).expect("no failure is asked for");
    let communicator =
        Communicator::init(&library, &id, 0, 1, &Config::new()).expect("no other rank is needed");
    // SAFETY: refused before the memory is used.
    let error = unsafe { communicator.register(lend(&[0_u8])) }.expect_err("it lacks the function");
    assert!(matches!(error, Error::MissingSymbol { symbol: "ncclCommRegister", .. }), "{error}");
}

#[test]
fn what_the_process_has_loaded_comes_first() {
    let directory = TempDir::new().expect("a directory");
    let file = build(directory.path(), &["-Wl,-soname,libnccl.so.2"]);
    let opened = Library::open(&file).expect("it has all functions");
    let found = Library::load().expect("the process has one");
    assert_eq!(found.origin(), &Origin::Process);
    assert_eq!(found.version(), opened.version());
}

#[test]
fn what_came_later_is_refused_by_name() {
    let stub = Stub::of(Version::MINIMUM);
    let library = stub.library();
    let communicator = stub.alone(&Config::new());
    let id = UniqueId::new(&library).expect("no failure is asked for");
    let init = |config| Communicator::init(&library, &id, 0, 1, &config).map(|_| ());
    let mut bytes = [0_u8; 4];
    // SAFETY: refused before the memory is used.
    let float8 = unsafe { DeviceSliceMut::from_raw_parts(bytes.as_mut_ptr() as u64, 4, DataType::F8E4M3, 0) };
    // SAFETY: as above.
    let registered = unsafe { communicator.register(lend(&[0_u8])) };
    for (result, feature) in [
        (init(Config::new().traffic_class(1)), Feature::TrafficClass),
        (init(Config::new().nvls_ctas(1)), Feature::NvlsCtas),
        (init(Config::new().channels_per_net_peer(1)), Feature::ChannelsPerNetPeer),
        (communicator.all_reduce_in_place(float8, ReduceOp::Max, Stream::DEFAULT), Feature::Float8),
        (registered.map(|_| ()), Feature::BufferRegistration),
    ] {
        let error = result.expect_err("2.18.1 does not know it");
        assert_eq!(error, Error::Unsupported { feature, found: Version::MINIMUM });
        assert!(error.to_string().contains(&format!("came with {}", feature.since())), "{error}");
        assert!(!library.supports(feature));
        assert!(Stub::of(feature.since()).library().supports(feature));
    }
}

#[test]
fn every_version_reads_the_settings_in_its_own_layout() {
    const UNDEFINED: i64 = i32::MIN as i64;
    for (version, layout, size) in [
        (Version::new(2, 18, 6), 21_700, 48),
        (Version::new(2, 25, 1), 21_700, 48),
        (Version::new(2, 26, 2), 22_600, 48),
        (Version::new(2, 27, 7), 22_700, 72),
        (Version::new(2, 28, 9), 22_800, 80),
        (Version::new(2, 30, 7), 22_800, 80),
    ] {
        let stub = Stub::of(version);
        let library = stub.library();
        let base = Config::new().net_name("Socket").cga_cluster_size(2).min_ctas(3).max_ctas(5);
        let mut config = base.name("layout").non_blocking(LONG);
        let mut expected = vec![
            ("size", size),
            ("version", layout),
            ("blocking", 0),
            ("cga_cluster_size", 2),
            ("min_ctas", 3),
            ("max_ctas", 5),
            ("split_share", UNDEFINED),
        ];
        if library.supports(Feature::TrafficClass) {
            config = config.traffic_class(7);
            expected.push(("traffic_class", 7));
        }
        if library.supports(Feature::NvlsCtas) {
            config = config.nvls_ctas(11);
            expected.push(("nvls_ctas", 11));
        }
        if library.supports(Feature::ChannelsPerNetPeer) {
            config = config.channels_per_net_peer(4);
            expected.push(("channels_per_net_peer", 4));
        }
        let _communicator = stub.alone(&config);
        for (field, value) in expected {
            assert_eq!(stub.config(field), value, "{field} of {version}");
        }
        assert_eq!(stub.config_text("net_name").as_deref(), Some("Socket"));
        let name = stub.config_text("name");
        assert_eq!(name.as_deref(), (version >= Version::new(2, 27, 0)).then_some("layout"), "{version}");

        let _blocking = stub.alone(&Config::new());
        assert_eq!(stub.config("blocking"), 1);
        assert_eq!(stub.config("max_ctas"), UNDEFINED);
        assert_eq!(stub.config_text("net_name"), None);
    }
}

#[test]
fn a_least_number_of_blocks_goes_with_a_most() {
    let stub = Stub::new();
    let library = stub.library();
    let id = UniqueId::new(&library).expect("no failure is asked for");
    for config in [Config::new().min_ctas(4), Config::new().min_ctas(4).max_ctas(3)] {
        let error = Communicator::init(&library, &id, 0, 1, &config).expect_err("the library refuses it");
        assert!(error.to_string().starts_with("min_ctas cannot be 4"), "{error}");
    }
    stub.alone(&Config::new().min_ctas(4).max_ctas(4));
    stub.alone(&Config::new().max_ctas(4));
}
