//! File patterns.

use super::*;
use crate::source::expand;
use crate::source::pattern::incomplete_shards;

/// A directory with the given files, each holding one letter.
fn directory_of(files: &[&str]) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    for file in files {
        let path = directory.path().join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "x").unwrap();
    }
    directory
}

/// Files that a pattern below `directory` names, relative to it.
fn expanded(directory: &TempDir, pattern: &str) -> Vec<String> {
    let root = directory.path();
    let files = expand(&format!("{}/{pattern}", root.display())).unwrap();
    files.iter().map(|file| file.strip_prefix(root).unwrap().to_str().unwrap().to_owned()).collect()
}

#[test]
fn files_globs_lists_and_ranges_are_sorted_bytewise() {
    let directory =
        directory_of(&["b.json", "B.json", "a.json", "s-00.txt", "s-01.txt", "s-02.txt", "s-10.txt"]);
    assert_eq!(expanded(&directory, "a.json"), ["a.json"]);
    assert_eq!(expanded(&directory, "*.json"), ["B.json", "a.json", "b.json"]);
    assert_eq!(expanded(&directory, "[ab].json"), ["a.json", "b.json"]);
    assert_eq!(expanded(&directory, "{b,a,a}.json"), ["a.json", "b.json"]);
    assert_eq!(expanded(&directory, "s-{00..02}.txt"), ["s-00.txt", "s-01.txt", "s-02.txt"]);
    assert_eq!(expanded(&directory, "s-{9..12}.txt"), ["s-10.txt"]);
    assert_eq!(expanded(&directory, "{s-{00,10},a}.{txt,json}"), ["a.json", "s-00.txt", "s-10.txt"]);
    assert_eq!(expanded(&directory, "s-?{0,2}.*"), ["s-00.txt", "s-02.txt", "s-10.txt"]);
}

#[test]
fn directories_give_their_data_and_nothing_else() {
    let directory = directory_of(&[
        "en/train.json.gz",
        "en/deep/er/part.parquet",
        "en/text.txt",
        "en/.hidden.json",
        "en/.cache/x.json",
        "en/half.json.gz.incomplete",
        "en/half.json.part",
        "en/dataset_info.json",
        "en/README.md",
        "en/program",
        "en/old.json.bz2",
        "en/old.tar.bz2",
    ]);
    // Files of bzip2 are named, so that reading them says why it cannot.
    let expected = ["en/deep/er/part.parquet", "en/old.json.bz2", "en/text.txt", "en/train.json.gz"];
    assert_eq!(expanded(&directory, "en"), expected);
    assert_eq!(expanded(&directory, "e*"), expected);
    assert_eq!(expanded(&directory, "**/*.txt"), ["en/text.txt"]);
}

#[test]
fn commas_separate_patterns() {
    let directory = directory_of(&["a.json", "b.json", "c,d.json", "en/x.txt", "en/y.txt"]);
    let root = directory.path().display();
    let both = |second: &str| expanded(&directory, &format!("b.json,{root}/{second}"));
    assert_eq!(both("a.json"), ["a.json", "b.json"]);
    assert_eq!(both("b.json"), ["b.json"]);
    assert_eq!(both("{a,b}.json"), ["a.json", "b.json"]);
    assert_eq!(both("en"), ["b.json", "en/x.txt", "en/y.txt"]);
    assert_eq!(
        expanded(&directory, &format!("en/?.txt , {root}/a.json")),
        ["a.json", "en/x.txt", "en/y.txt"]
    );
    assert_eq!(expanded(&directory, "c,d.json"), ["c,d.json"], "a name with a comma is a file first");
    assert_eq!(expanded(&directory, "c[,]?.json"), ["c,d.json"]);
    let error = expand(&format!("{root}/a.json,{root}/none.json")).unwrap_err().to_string();
    assert!(error.contains(&format!("no file matches `{root}/none.json`")), "{error}");
    for pattern in ["a.json,", ",a.json", "a.json,,b.json"] {
        let error = expand(&pattern.replace("a.json", &format!("{root}/a.json"))).unwrap_err().to_string();
        assert!(error.contains("a path is missing beside a comma"), "{error}");
    }
}

#[test]
fn lists_name_a_pattern_a_line() {
    let directory = directory_of(&["a.json", "b.json", "c,d.json", "s-0.txt", "s-1.txt"]);
    let root = directory.path().display().to_string();
    let list = directory.path().join("list.txt");
    let write = |lines: &[&str]| {
        let lines: Vec<String> = lines.iter().map(|line| line.replace("ROOT", &root)).collect();
        fs::write(&list, lines.join("\n")).unwrap();
    };
    let names = |pattern: &str| -> Vec<String> {
        let files = expand(pattern).unwrap();
        files.iter().map(|file| file.file_name().unwrap().to_str().unwrap().to_owned()).collect()
    };
    let pattern = format!("@{}", list.display());
    write(&["# all but one", "", "ROOT/s-{0..1}.txt", "  ROOT/a.json  ", "ROOT/c,d.json", "ROOT/a.json"]);
    assert_eq!(names(&pattern), ["a.json", "c,d.json", "s-0.txt", "s-1.txt"]);
    assert_eq!(names(&format!("{root}/b.json,{pattern}")).len(), 5);

    let refused = |part: &str| {
        let error = expand(&pattern).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    };
    write(&["ROOT/a.json", "ROOT/none.json"]);
    refused(&format!("no file matches `{root}/none.json`; line 2 of {}; ", list.display()));
    write(&["ROOT/a-{0..", "ROOT/a.json"]);
    refused(&format!("`{{` without `}}` (line 1 of {})", list.display()));
    write(&["@ROOT/list.txt"]);
    refused("a list cannot name another (line 1 of ");
    write(&["# nothing", ""]);
    refused("the list names no file");
    fs::remove_file(&list).unwrap();
    refused(&format!("cannot read {}: ", list.display()));
}

#[test]
fn a_name_with_braces_is_a_file_first() {
    let directory = directory_of(&["{a}.txt"]);
    assert_eq!(expanded(&directory, "{a}.txt"), ["{a}.txt"]);
}

#[test]
fn nothing_found_names_the_pattern() {
    let directory = directory_of(&["program"]);
    let root = directory.path().display().to_string();
    for (pattern, note) in [
        (format!("{root}/*.json"), format!("{root} exists")),
        (format!("{root}/no/such/file.json"), format!("{root} exists")),
        (format!("{root}/{{a,b}}.json"), format!("{root} exists")),
        (root.clone(), "the directory holds no .json".to_owned()),
        ("no-such-file-*.json".to_owned(), "looked from /".to_owned()),
    ] {
        let error = expand(&pattern).unwrap_err().to_string();
        assert!(error.contains(&format!("no file matches `{pattern}`")), "{error}");
        assert!(error.contains(&note), "{error}");
    }
}

#[test]
fn malformed_patterns_say_why() {
    for (pattern, reason) in [
        ("a-{0..", "`{` without `}`"),
        ("a-{7..3}.json", "`{7..3}` is not an ascending range of numbers"),
        ("a-{x..y}.json", "`{x..y}` is not an ascending range of numbers"),
        ("a-{0..99999999}.json", "it names more than 1048576 files"),
        ("a-[.json", "invalid range pattern"),
    ] {
        let error = expand(pattern).unwrap_err().to_string();
        assert!(error.contains(pattern) && error.contains(reason), "{error}");
    }
}

#[test]
fn gaps_in_sets_of_shards_are_found() {
    let paths = |names: &[&str]| names.iter().map(PathBuf::from).collect::<Vec<_>>();
    let files = paths(&[
        "/d/c4-train.00000-of-00004.json.gz",
        "/d/c4-train.00003-of-00004.json.gz",
        "/d/train-00000-of-00002.parquet",
        "/d/train-00001-of-00002.parquet",
        "/d/plain.json",
    ]);
    let gaps = incomplete_shards(&files);
    assert_eq!(gaps.len(), 1);
    assert_eq!(gaps[0].missing, [1, 2]);
    assert_eq!(gaps[0].to_string(), "2 of 4 shards of /d/c4-train present: missing 1, 2");
    let mc4 = paths(&["/d/c4-af.tfrecord-00001-of-00064.json.gz"]);
    assert!(incomplete_shards(&mc4)[0].to_string().ends_with("missing 0, 2, 3, 4, 5, 6, 7, 8, 9, 10, ..."));
}
