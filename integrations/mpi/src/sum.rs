//! A sum over ranks with the same bits on all of them.

use mpi::traits::*;
use sae_kernels::Element;

/// Numbers that are sent at a time: memory is bounded, and counts fit in MPI's integers.
const CHUNK: usize = 1 << 22;

/// Replaces `values`, as many on every rank, by their sums over ranks: added in the order of the ranks, in f64, and rounded once.
///
/// `MPI_Allreduce` gives all ranks the same sums too, but adds in an order that may change with the length, the number of hosts and the
/// library. Here each rank gets its share of the numbers from all others, adds it up and sends the sums to all: 2(P−1)/P of the bytes sent
/// and received by each rank, as in a ring of P ranks, and (P−1)/P additions a number. A reduction to one rank and a broadcast would have
/// that rank receive P−1 times all bytes, and so would gathering them everywhere.
pub fn sum<T: Element + Equivalence>(world: &impl Communicator, values: &mut [T]) {
    let ranks = world.size() as usize;
    let (mut sent, mut received) = (Vec::new(), Vec::new());
    for chunk in values.chunks_mut(CHUNK) {
        let share = chunk.len().div_ceil(ranks);
        sent.clear();
        sent.extend_from_slice(chunk);
        sent.resize(share * ranks, T::from_f64(0.0));
        received.resize(share * ranks, T::from_f64(0.0));
        world.all_to_all_into(&sent[..], &mut received[..]);
        let add = |at: usize| T::from_f64((0..ranks).map(|rank| received[rank * share + at].to_f64()).sum());
        let sums: Vec<T> = (0..share).map(add).collect();
        world.all_gather_into(&sums[..], &mut sent[..]);
        chunk.copy_from_slice(&sent[..chunk.len()]);
    }
}
