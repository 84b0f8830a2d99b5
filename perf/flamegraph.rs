//! flamegraph: samples of perf to a picture. `perf script | flamegraph TITLE SVG` writes the picture, and prints the
//! stacks it is made of, folded: one a line, outermost function first, the kernel's marked with `_[k]`, and how often.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Write};
use std::path::PathBuf;

use clap::Parser;
use inferno::collapse::Collapse;
use inferno::collapse::perf::{Folder, Options as FolderOptions};
use inferno::flamegraph::color::{MultiPalette, Palette};
use inferno::flamegraph::{self, Options};

/// Functions that were on the stack in a smaller share of the samples are left out, in per cent.
const NARROWEST: f64 = 0.2;

/// Draws what `perf script` prints.
#[derive(Parser)]
struct Cli {
    title: String,
    svg: PathBuf,
}

fn main() -> anyhow::Result<()> {
    let Cli { title, svg } = Cli::parse();
    let mut folding = FolderOptions::default();
    folding.annotate_kernel = true;
    let mut folded = Vec::new();
    Folder::from(folding).collapse(BufReader::new(io::stdin()), &mut folded)?;
    // What the kernel maps into every process (vDSO) runs in user space.
    let folded = without_hashes(&String::from_utf8_lossy(&folded))
        .replace("__vdso_clock_gettime_[k]", "__vdso_clock_gettime");

    let mut drawing = Options::default();
    drawing.title = title;
    // The kernel's functions are orange, hythe's yellow or green, those of C red.
    drawing.colors = Palette::Multi(MultiPalette::Java);
    drawing.deterministic = true;
    drawing.min_width = NARROWEST;
    drawing.image_width = Some(1200);
    flamegraph::from_lines(&mut drawing, folded.lines(), BufWriter::new(File::create(svg)?))?;
    io::stdout().write_all(folded.as_bytes())?;
    Ok(())
}

/// Names of functions without what the compiler tells instances apart by: `::h` and sixteen digits.
fn without_hashes(folded: &str) -> String {
    let mut parts = folded.split("::h");
    let mut text = parts.next().unwrap_or_default().to_string();
    for part in parts {
        let is_hash = part.len() >= 16 && part.as_bytes()[..16].iter().all(u8::is_ascii_hexdigit);
        text.push_str(if is_hash { "" } else { "::h" });
        text.push_str(if is_hash { &part[16..] } else { part });
    }
    text
}
