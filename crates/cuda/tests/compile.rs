//! Every source compiles for every architecture that it is written for. Needs NVRTC, no device.

use switchyard_cuda::{Compiler, CudaError, SOURCES};

#[test]
#[ignore = "needs libnvrtc.so.13; `cargo xtask test --libtorch` brings it"]
fn all_sources_compile() {
    for architecture in ["sm_80", "sm_90a"] {
        for source in SOURCES.iter().filter(|source| source.is_for(architecture)) {
            let code = Compiler::new(architecture, None).compile(source).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(code[..4], *b"\x7fELF", "{} for {architecture}", source.name);
        }
    }
}

#[test]
#[ignore = "needs libnvrtc.so.13; `cargo xtask test --libtorch` brings it"]
fn what_was_compiled_once_is_read_from_the_disk() {
    let directory = tempfile::tempdir().unwrap();
    let compiler = Compiler::new("sm_90a", Some(directory.path().to_owned()));
    let source = &SOURCES[0];
    let first = compiler.compile(source).unwrap();
    let kept: Vec<_> =
        std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    let [kept] = &kept[..] else { panic!("{kept:?}") };
    assert_eq!(std::fs::read(kept).unwrap(), first);
    std::fs::write(kept, b"kept").unwrap();
    assert_eq!(compiler.compile(source).unwrap(), b"kept");
}

#[test]
#[ignore = "needs libnvrtc.so.13; `cargo xtask test --libtorch` brings it"]
fn an_unknown_architecture_is_an_error_that_names_it() {
    let error = Compiler::new("sm_1", None).compile(&SOURCES[0]).unwrap_err();
    assert!(matches!(&error, CudaError::Compile { architecture, .. } if architecture == "sm_1"), "{error}");
}
