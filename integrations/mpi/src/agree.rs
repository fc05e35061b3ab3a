//! Ranks that do not do the same thing find out before they wait for each other.

use crate::Error;
use mpi::traits::*;
use std::hash::{DefaultHasher, Hasher};

/// Bytes of a description that the others get to see.
const SHOWN: usize = 512;

/// Compares what the ranks are about to do: `what` follows the word "rank 0" in the error. Sends 8 bytes if all say the same.
///
/// # Errors
/// [`Error::Disagreement`], on all ranks, with what the first rank that differs from rank 0 says.
pub fn agree(world: &impl Communicator, what: &str) -> Result<(), Error> {
    let ranks = world.size() as usize;
    let mut digests = vec![0u64; ranks];
    let mut hasher = DefaultHasher::new();
    hasher.write(what.as_bytes());
    world.all_gather_into(&hasher.finish(), &mut digests[..]);
    let Some(rank) = digests.iter().position(|digest| *digest != digests[0]) else { return Ok(()) };

    let mut shown = [0u8; SHOWN];
    let len = what.len().min(SHOWN);
    shown[..len].copy_from_slice(&what.as_bytes()[..len]);
    let mut all = vec![0u8; ranks * SHOWN];
    world.all_gather_into(&shown[..], &mut all[..]);
    let says = |rank: usize| {
        let text = &all[rank * SHOWN..(rank + 1) * SHOWN];
        String::from_utf8_lossy(text).trim_end_matches('\0').to_owned()
    };
    Err(Error::Disagreement { rank, theirs: says(rank), first: says(0) })
}
