//! Where the bytes of an archive's members lie: the ZIP format is the `zip` crate's, the bytes stay where they are.
//!
//! `torch.save` stores members without compression, so that each is a range of the mapped file. No member is read, and so
//! its checksum is not checked either. Not for: compressed or encrypted members, archives in several parts, or archives
//! with something before them.

use std::collections::HashMap;
use std::io::Cursor;
use std::ops::Range;
use std::path::Path;

use zip::read::{ArchiveOffset, Config};
use zip::{CompressionMethod, ZipArchive};

use crate::error::{Error, Result};

/// Far more than a checkpoint has tensors.
const MAX_MEMBERS: u64 = 1 << 17;

const LOCAL_HEADER: &[u8] = b"PK\x03\x04";
const LOCAL_HEADER_LEN: usize = 30;
const END: &[u8] = b"PK\x05\x06";
const END64: &[u8] = b"PK\x06\x06";
const END64_LOCATOR: &[u8] = b"PK\x06\x07";
const END_LEN: usize = 22;
const END64_LOCATOR_LEN: usize = 20;

/// Whether a file begins as an archive does.
pub(super) fn looks_like_zip(bytes: &[u8]) -> bool {
    bytes.starts_with(LOCAL_HEADER) || bytes.starts_with(END)
}

/// Finds the bytes of each member.
///
/// * `path`: named in errors
/// * `bytes`: the whole archive
///
/// # Errors
/// [`Error::BadFile`] if the archive is cut off or inconsistent; [`Error::Unsupported`] for a member that is compressed
/// or encrypted.
pub(super) fn members<'a>(path: &Path, bytes: &'a [u8]) -> Result<HashMap<&'a [u8], Range<usize>>> {
    let damaged =
        |reason: String| Error::bad_file(path, reason).with_hint("the file is cut off or damaged: fetch it again");
    if let Some(reason) = wrong_record(bytes) {
        return Err(damaged(reason));
    }
    let config = Config { archive_offset: ArchiveOffset::Known(0) };
    let mut archive = ZipArchive::with_config(config, Cursor::new(bytes))
        .map_err(|error| damaged(format!("the archive's directory cannot be read: {error}")))?;
    if archive.has_duplicate_names() {
        return Err(damaged("the archive's directory gives a member twice".to_owned()));
    }
    let directory = archive.central_directory_start();
    // The crate does not compare the directory's size, where it is given in 32 bits, with its place.
    let end_at = bytes.len().saturating_sub(END_LEN + archive.comment().len());
    let size =
        bytes[end_at..].strip_prefix(END).and_then(|end| Some(u32::from_le_bytes(*end.get(8..)?.first_chunk()?)));
    if size.is_none_or(|size| size != u32::MAX && directory.saturating_add(size.into()) > end_at as u64) {
        return Err(damaged(format!("the archive's directory at {directory} does not end before byte {end_at}")));
    }
    let limit = usize::try_from(directory).unwrap_or(usize::MAX).min(bytes.len());
    let mut members = HashMap::with_capacity(archive.len());
    for index in 0..archive.len() {
        let wrong =
            |name: &[u8]| damaged(format!("the archive's member `{}` is not where the directory has it", shown(name)));
        let raw_name = archive.metadata().entry(index).map_or(Vec::new(), |entry| entry.name_raw().to_vec());
        let member = archive.by_index_raw(index).map_err(|_| wrong(&raw_name))?;
        let unsupported = |what: &str| {
            let name = shown(member.name_raw());
            Error::unsupported(format!("the {what} member `{name}` of the archive `{}`", path.display()))
                .with_hint("save the checkpoint anew with `torch.save`, which stores members as they are")
        };
        if member.encrypted() {
            return Err(unsupported("encrypted"));
        }
        if member.compression() != CompressionMethod::Stored {
            return Err(unsupported("compressed"));
        }
        let place = || {
            let header = usize::try_from(member.header_start()).ok()?.checked_add(LOCAL_HEADER_LEN)?;
            let name = bytes.get(header..)?.get(..member.name_raw().len())?;
            let start = usize::try_from(member.data_start()?).ok()?;
            let range = start..start.checked_add(usize::try_from(member.size()).ok()?)?;
            let is_there = name == member.name_raw() && range.end <= limit && member.size() == member.compressed_size();
            is_there.then_some((name, range))
        };
        let (name, range) = place().ok_or_else(|| wrong(member.name_raw()))?;
        members.insert(name, range);
    }
    Ok(members)
}

/// What is wrong with a 64-bit record: the `zip` crate believes its numbers when it reserves memory.
fn wrong_record(bytes: &[u8]) -> Option<String> {
    let u64_at = |at: usize| Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
    let tail = bytes.len().saturating_sub(END64_LOCATOR_LEN + END_LEN + usize::from(u16::MAX));
    let locators = (tail..bytes.len()).filter(|&at| bytes[at..].starts_with(END64_LOCATOR));
    locators.filter_map(|at| usize::try_from(u64_at(at + 8)?).ok()).find_map(|at| {
        bytes.get(at..)?.strip_prefix(END64)?;
        let (count, size, offset) = (u64_at(at + 32)?, u64_at(at + 40)?, u64_at(at + 48)?);
        if count > MAX_MEMBERS {
            return Some(format!("the archive announces {count} members, expected at most {MAX_MEMBERS}"));
        }
        let fits = offset.checked_add(size).is_some_and(|end| end <= at as u64);
        (!fits).then(|| format!("the archive's directory of {size} bytes at {offset} lies beyond byte {at}"))
    })
}

/// A member's name in a message.
fn shown(name: &[u8]) -> String {
    super::pickle::shown(&String::from_utf8_lossy(&name[..name.len().min(1000)]))
}
