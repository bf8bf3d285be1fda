//! How a file of a saved cache is laid out: its header, its description, and where its sections are.

use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::foreign;
use crate::records::{ALIGN, Section, Sink};

/// How a file begins.
pub(super) const MAGIC: &[u8; 8] = b"AKVCACHE";

/// The version of the format that is written and read.
const VERSION: u32 = 2;

/// Bytes of the header.
const HEADER: usize = 64;

/// What is said to someone whose file is damaged.
pub(super) const AGAIN: &str = "save the cache again, or copy the file anew from where it is whole";

/// What a file says of itself, as JSON.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Description {
    /// What wrote it.
    pub program: String,
    pub model: ModelSide,
    /// See [`KvDtype::name`](crate::cache::KvDtype::name).
    pub kv_dtype: String,
    /// The configuration, as its file has it; `null` for a full cache.
    pub config: Option<Value>,
    /// Tokens given.
    pub tokens: usize,
    /// The last of them, which no profile has decided about.
    pub undecided: usize,
    /// How many more tokens there were than positions are taken.
    pub shifted: usize,
    /// Bytes of a token's id in the section of tokens, 2 or 4.
    pub id_bytes: usize,
    /// Kept keys and values, and what a full cache of the same tokens needs, in bytes.
    pub kept_bytes: usize,
    pub raw_bytes: usize,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub dialogue: Option<Value>,
    /// `[1 + num_layers]` the tokens, then each layer: offset, length and CRC-32.
    pub sections: Vec<(u64, u64, u32)>,
}

/// What has to be the same of the model that a cache is given to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ModelSide {
    pub architecture: String,
    pub layers: usize,
    pub query_heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Fingerprint of the weights.
    pub weights: String,
    /// Fingerprint of the vocabulary.
    pub vocabulary: String,
    pub rope: Value,
    /// `[num_layers]` tokens that a token looks at; left out if all layers look at everything.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub windows: Option<Vec<Option<usize>>>,
}

/// A section in a file that is there.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub range: Range<usize>,
    /// What its bytes should add up to.
    pub crc32: u32,
}

/// Writes a file: header, sections, description.
///
/// * `sections`: writes one section, by its number
pub(super) fn write(
    file: &mut File,
    mut description: Description,
    num_sections: usize,
    write_section: &mut dyn FnMut(usize, &mut Sink<'_>),
) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(1 << 20, &mut *file);
    out.write_all(&[0; HEADER])?;
    let mut sink = Sink::new(&mut out, HEADER as u64);
    for section in 0..num_sections {
        write_section(section, &mut sink);
        let Section { offset, length, crc32 } = sink.end_section()?;
        description.sections.push((offset, length, crc32));
    }
    let text = serde_json::to_vec(&description)?;
    sink.bytes(&text);
    let section = sink.end_section()?;
    out.flush()?;
    drop(out);

    let mut header = Vec::with_capacity(HEADER);
    header.extend_from_slice(MAGIC);
    header.extend_from_slice(&VERSION.to_le_bytes());
    header.extend_from_slice(&section.crc32.to_le_bytes());
    for number in [section.offset + section.length, section.offset, text.len() as u64] {
        header.extend_from_slice(&number.to_le_bytes());
    }
    header.resize(HEADER - size_of::<u32>(), 0);
    header.extend_from_slice(&crc32fast::hash(&header).to_le_bytes());
    file.seek(SeekFrom::Start(0))?;
    file.write_all(&header)
}

/// Reads what a file says of itself, and where its sections are: one behind the other, without gaps, from the header to the
/// description. Header and description are compared with their checksums; sections are not.
///
/// # Errors
/// [`Error::BadFile`] if it is none, ends too early or is damaged; [`Error::Unsupported`] for another version.
pub(super) fn read(path: &Path, bytes: &[u8]) -> Result<(Description, Vec<Place>)> {
    let bad = |reason: String| Error::bad_file(path, reason).with_hint(AGAIN);
    if !bytes.starts_with(MAGIC) {
        return Err(foreign::unlike(path, bytes, "a saved cache", "save one with `cache create`"));
    }
    let Some((header, _)) = bytes.split_first_chunk::<HEADER>() else {
        return Err(bad(format!("it ends within its header of {HEADER} bytes")));
    };
    let u32_at = |at: usize| header[at..].first_chunk().map(|&bytes| u32::from_le_bytes(bytes)).unwrap_or_default();
    let u64_at = |at: usize| header[at..].first_chunk().map(|&bytes| u64::from_le_bytes(bytes)).unwrap_or_default();
    let version = u32_at(8);
    if version != VERSION {
        return Err(Error::unsupported(format!("version {version} of saved caches (`{}`)", path.display()))
            .with_hint(format!("this program reads version {VERSION}; save the cache with it")));
    }
    if crc32fast::hash(&header[..HEADER - 4]) != u32_at(HEADER - 4) {
        return Err(bad("its header is damaged: the checksum differs".to_owned()));
    }
    let length = u64_at(16);
    if length != bytes.len() as u64 {
        return Err(bad(format!("it has {} of {length} bytes", bytes.len())));
    }
    let place = |offset: u64, length: u64| -> Option<Range<usize>> {
        let (offset, length) = (usize::try_from(offset).ok()?, usize::try_from(length).ok()?);
        let range = offset..offset.checked_add(length)?;
        (offset.is_multiple_of(ALIGN) && range.end <= bytes.len()).then_some(range)
    };
    let description = place(u64_at(24), u64_at(32)).ok_or_else(|| bad("its description lies elsewhere".to_owned()))?;
    if crc32fast::hash(&bytes[description.start..]) != u32_at(12) {
        return Err(bad("its description is damaged: the checksum differs".to_owned()));
    }
    let start = description.start;
    let description: Description = serde_json::from_slice(&bytes[description])
        .map_err(|error| bad(format!("its description is not what version {VERSION} has: {error}")))?;
    let mut end = HEADER;
    let mut sections = Vec::with_capacity(description.sections.len());
    for &(offset, length, crc32) in &description.sections {
        let section = place(offset, length).filter(|section| section.start == end);
        let section = section.ok_or_else(|| bad(format!("a section of {length} bytes at {offset}, not at {end}")))?;
        end = section.end;
        sections.push(Place { range: section, crc32 });
    }
    if end != start {
        return Err(bad(format!("its sections end at {end}, and its description begins at {start}")));
    }
    Ok((description, sections))
}
