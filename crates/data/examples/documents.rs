//! Prints the documents behind a source's path, one paragraph a line, as training would read them.
//!
//! `cargo run --release -p switchyard-data --example documents -- sample:validation`

use std::error::Error;
use std::io::{self, Write as _};
use std::path::Path;

use switchyard_config::plan::{OnCorrupt, TextDocument};
use switchyard_data::source::{DocumentReader, ReadOptions, resolve};

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args().nth(1).ok_or("usage: documents FILE|DIRECTORY|PATTERN|sample")?;
    let options = ReadOptions {
        text_column: "text".to_owned(),
        text_document: TextDocument::Paragraph,
        on_corrupt: OnCorrupt::Fail,
    };
    let mut out = io::BufWriter::new(io::stdout().lock());
    for file in resolve(&path, Path::new("cache"))? {
        let mut documents = DocumentReader::open(&file, &options)?;
        for document in documents.by_ref() {
            let document = document?;
            writeln!(out, "== {}\n{}", document.position, document.text)?;
        }
        writeln!(out, "-- {}: {:?}", file.display(), documents.counts())?;
    }
    Ok(())
}
