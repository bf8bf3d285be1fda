//! The directory of a ZIP archive whose members are stored without compression: where each one's bytes lie.
//!
//! Format: <https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT>, the ZIP64 records included. Every length is
//! checked against the file. No member is read, and so its checksum is not checked either.
//!
//! Not for: compressed or encrypted members, archives in several parts, or archives with something before them.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use crate::error::{Error, Result};

const LOCAL_HEADER: &[u8] = b"PK\x03\x04";
const DIRECTORY_ENTRY: &[u8] = b"PK\x01\x02";
const END: &[u8] = b"PK\x05\x06";
const END64: &[u8] = b"PK\x06\x06";
const END64_LOCATOR: &[u8] = b"PK\x06\x07";

const LOCAL_HEADER_LEN: usize = 30;
const DIRECTORY_ENTRY_LEN: usize = 46;
const END_LEN: usize = 22;
const END64_LEN: usize = 56;
const END64_LOCATOR_LEN: usize = 20;

/// Far more than a checkpoint has tensors.
const MAX_MEMBERS: u64 = 1 << 17;

/// The number of the extra field with 64-bit sizes.
const EXTRA_ZIP64: u16 = 1;
/// Flags of members that are encrypted, in whole, strongly, or in their headers.
const FLAGS_ENCRYPTED: u16 = 1 | 1 << 6 | 1 << 13;

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
    Archive { path, bytes }.members()
}

struct Archive<'a, 'p> {
    path: &'p Path,
    bytes: &'a [u8],
}

/// Where the directory lies, and how many entries it has.
struct Directory {
    range: Range<usize>,
    count: u64,
}

impl<'a> Archive<'a, '_> {
    fn damaged(&self, reason: impl Into<String>) -> Error {
        Error::bad_file(self.path, reason).with_hint("the file is cut off or damaged: fetch it again")
    }

    fn members(&self) -> Result<HashMap<&'a [u8], Range<usize>>> {
        let Directory { range, count } = self.directory()?;
        let mut members = HashMap::new();
        let mut at = range.start;
        for _ in 0..count {
            let (name, member, next) = self.entry(at, &range)?;
            if members.insert(name, member).is_some() {
                return Err(self.damaged(format!("the archive's member `{}` is given twice", shown(name))));
            }
            at = next;
        }
        Ok(members)
    }

    /// Reads the record at the archive's end.
    fn directory(&self) -> Result<Directory> {
        let missing = || self.damaged("the archive's directory at its end is missing");
        let len = self.bytes.len();
        let last = len.checked_sub(END_LEN).ok_or_else(missing)?;
        // The record ends with a comment of at most 65535 bytes, which is nearly always empty.
        let end_at = (last.saturating_sub(usize::from(u16::MAX))..=last).rev().find(|&at| {
            let record = &self.bytes[at..];
            record.starts_with(END) && usize::from(u16_at(record, 20)) == record.len() - END_LEN
        });
        let end_at = end_at.ok_or_else(missing)?;
        let end = &self.bytes[end_at..end_at + END_LEN];

        let locator = end_at.checked_sub(END64_LOCATOR_LEN).map(|at| &self.bytes[at..end_at]);
        let (size, offset, count, limit) = match locator {
            Some(locator) if locator.starts_with(END64_LOCATOR) => {
                let at = usize::try_from(u64_at(locator, 8)).ok();
                let record = at.and_then(|at| self.bytes[..end_at].get(at..)?.get(..END64_LEN));
                let record = record.filter(|record| record.starts_with(END64));
                let (Some(at), Some(record)) = (at, record) else {
                    return Err(self.damaged("the archive's 64-bit record is not where it should be"));
                };
                (u64_at(record, 40), u64_at(record, 48), u64_at(record, 32), at)
            }
            _ => {
                let count = u64::from(u16_at(end, 10));
                (u64::from(u32_at(end, 12)), u64::from(u32_at(end, 16)), count, end_at)
            }
        };
        let start = usize::try_from(offset).ok();
        let stop = offset.checked_add(size).and_then(|stop| usize::try_from(stop).ok());
        let range = start.zip(stop).map(|(start, stop)| start..stop).filter(|range| range.end <= limit);
        let Some(range) = range else {
            let reason = format!("the archive's directory of {size} bytes at {offset} lies beyond byte {limit}");
            return Err(self.damaged(reason));
        };
        if count > MAX_MEMBERS || count > (range.len() / DIRECTORY_ENTRY_LEN) as u64 {
            let reason = format!("the archive announces {count} members in a directory of {} bytes", range.len());
            return Err(self.damaged(reason));
        }
        Ok(Directory { range, count })
    }

    /// Name and bytes of the member whose directory entry is at `at`, and where the next entry begins.
    fn entry(&self, at: usize, directory: &Range<usize>) -> Result<(&'a [u8], Range<usize>, usize)> {
        let rest = &self.bytes[at..directory.end];
        let wrong = || self.damaged(format!("the archive's directory is wrong at byte {at}"));
        if rest.len() < DIRECTORY_ENTRY_LEN || !rest.starts_with(DIRECTORY_ENTRY) {
            return Err(wrong());
        }
        let name_len = usize::from(u16_at(rest, 28));
        let extra_at = DIRECTORY_ENTRY_LEN + name_len;
        let comment_at = extra_at + usize::from(u16_at(rest, 30));
        let next = comment_at + usize::from(u16_at(rest, 32));
        if next > rest.len() {
            return Err(wrong());
        }
        let name = &rest[DIRECTORY_ENTRY_LEN..extra_at];

        let unsupported = |what: &str| {
            Error::unsupported(format!("{what} member `{}` of the archive `{}`", shown(name), self.path.display()))
                .with_hint("save the checkpoint anew with `torch.save`, which stores members as they are")
        };
        if u16_at(rest, 8) & FLAGS_ENCRYPTED != 0 {
            return Err(unsupported("the encrypted"));
        }
        if u16_at(rest, 10) != 0 {
            return Err(unsupported("the compressed"));
        }
        // In this order the 64-bit field has those numbers that do not fit into 32 bits, and no others.
        let mut numbers = [24, 20, 42].map(|at| u64::from(u32_at(rest, at)));
        let mut wide = zip64_field(&rest[extra_at..comment_at]);
        for number in &mut numbers {
            if *number == u64::from(u32::MAX) && !wide.is_empty() {
                if wide.len() < 8 {
                    return Err(wrong());
                }
                *number = u64_at(wide, 0);
                wide = &wide[8..];
            }
        }
        let [size, stored_size, local_at] = numbers;
        let range = self.data(name, local_at, size, directory.start);
        match range {
            Some(range) if size == stored_size => Ok((name, range, at + next)),
            _ => Err(self.damaged(format!(
                "the archive's member `{}` of {size} bytes is not at {local_at}, where the directory has it",
                shown(name)
            ))),
        }
    }

    /// The bytes behind a member's own header, which must lie before `limit`.
    fn data(&self, name: &[u8], local_at: u64, size: u64, limit: usize) -> Option<Range<usize>> {
        let local_at = usize::try_from(local_at).ok()?;
        let header = self.bytes[..limit].get(local_at..)?;
        if header.len() < LOCAL_HEADER_LEN || !header.starts_with(LOCAL_HEADER) {
            return None;
        }
        let name_end = LOCAL_HEADER_LEN + usize::from(u16_at(header, 26));
        if header.get(LOCAL_HEADER_LEN..name_end)? != name {
            return None;
        }
        let start = local_at + name_end + usize::from(u16_at(header, 28));
        let end = start.checked_add(usize::try_from(size).ok()?)?;
        (end <= limit).then_some(start..end)
    }
}

/// The content of the extra field with 64-bit sizes; empty if there is none.
fn zip64_field(mut extra: &[u8]) -> &[u8] {
    while extra.len() >= 4 {
        let (kind, len) = (u16_at(extra, 0), usize::from(u16_at(extra, 2)));
        let Some(content) = extra[4..].get(..len) else { break };
        if kind == EXTRA_ZIP64 {
            return content;
        }
        extra = &extra[4 + len..];
    }
    &[]
}

/// A member's name in a message.
fn shown(name: &[u8]) -> String {
    super::pickle::shown(&String::from_utf8_lossy(&name[..name.len().min(1000)]))
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[at..at + N]);
    array
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array_at(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, at))
}
