//! A job on all ranks, or on none.

use crate::agree;
use mpi::Threading;
use mpi::topology::SimpleCommunicator;
use mpi::traits::*;
use std::fmt::Display;
use std::panic;
use std::sync::Arc;

/// Starts MPI, runs `job` on each rank, and stops MPI. As soon as `job` panics on any thread or fails, or returns while other ranks are
/// in a [`step`](crate::step()), the error goes to stderr and all ranks end with a status that is not 0.
///
/// Without this the others would wait for a rank that does not come any more, and so would the end of MPI on that rank.
///
/// # Panics
/// If MPI was started before: hosts that start it themselves call [`step`](crate::step()) with their own communicator, and end the job when it
/// fails.
pub fn run<E: Display>(job: impl FnOnce(&SimpleCommunicator) -> Result<(), E>) {
    // A panic may be on any thread. Where MPI grants less, it most likely ends the job all the same.
    let (universe, _) =
        mpi::initialize_with_threading(Threading::Multiple).expect("MPI is started once, by this function");
    let world = universe.world();
    let rank = world.rank();
    let hook = Arc::new(panic::take_hook());
    let report = hook.clone();
    panic::set_hook(Box::new(move |panic| {
        eprintln!("rank {rank} ends all ranks:");
        report(panic);
        SimpleCommunicator::world().abort(1);
    }));
    let finished = job(&world).map_err(|error| error.to_string());
    let finished = finished.and_then(|()| agree(&world, "is done").map_err(|error| error.to_string()));
    if let Err(error) = finished {
        eprintln!("rank {rank} ends all ranks: {error}");
        world.abort(1);
    }
    // Once MPI has stopped there is nobody left to end.
    panic::set_hook(Box::new(move |panic| hook(panic)));
}
