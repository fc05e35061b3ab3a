//! Threads. What is computed never depends on them: they only share out tasks that are cut by shape alone.

use crate::error::{Error, Result};
#[cfg(feature = "rayon")]
use rayon::prelude::*;
#[cfg(feature = "rayon")]
use std::sync::Arc;
#[cfg(feature = "rayon")]
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Work, in multiply-adds, below which waking other threads costs more than it gives (about 200 µs).
const SPREAD: usize = 12_000_000;

/// Who runs the tasks.
#[derive(Clone)]
pub(crate) enum Threads {
    /// The calling thread.
    One,
    /// Up to so many threads of rayon's current pool.
    #[cfg(feature = "rayon")]
    Current(usize),
    /// A pool of our own.
    #[cfg(feature = "rayon")]
    Pool(Arc<rayon::ThreadPool>),
}

impl Threads {
    /// The pool that the program already uses, if any threads are built in.
    pub(crate) fn current() -> Self {
        #[cfg(feature = "rayon")]
        return Threads::Current(rayon::current_num_threads());
        #[cfg(not(feature = "rayon"))]
        Threads::One
    }

    /// A pool of `threads` threads.
    pub(crate) fn new(threads: usize) -> Result<Self> {
        match threads {
            0 => Err(Error::Threads { threads, reason: "at least one is needed".into() }),
            1 => Ok(Threads::One),
            #[cfg(feature = "rayon")]
            _ => match rayon::ThreadPoolBuilder::new().num_threads(threads).build() {
                Ok(pool) => Ok(Threads::Pool(Arc::new(pool))),
                Err(error) => Err(Error::Threads { threads, reason: error.to_string() }),
            },
            #[cfg(not(feature = "rayon"))]
            _ => Err(Error::Threads { threads, reason: "this build lacks the feature `rayon`".into() }),
        }
    }

    /// How many threads share the work.
    pub(crate) fn count(&self) -> usize {
        match self {
            Threads::One => 1,
            #[cfg(feature = "rayon")]
            Threads::Current(count) => *count,
            #[cfg(feature = "rayon")]
            Threads::Pool(pool) => pool.current_num_threads(),
        }
    }

    /// Calls `task` once on each thread of an own pool.
    #[cfg(feature = "capi")]
    pub(crate) fn on_each_of_own(&self, task: impl Fn() + Sync) {
        match self {
            #[cfg(feature = "rayon")]
            Threads::Pool(pool) => {
                pool.broadcast(|_| task());
            }
            _ => {
                let _ = task;
            }
        }
    }

    /// Calls `task` for 0 … tasks − 1, on other threads too if `work` (in multiply-adds) is worth it.
    pub(crate) fn for_each(&self, tasks: usize, work: usize, task: impl Fn(usize) + Send + Sync) {
        if tasks < 2 || work < SPREAD || self.count() < 2 {
            return (0..tasks).for_each(task);
        }
        match self {
            Threads::One => (0..tasks).for_each(task),
            #[cfg(feature = "rayon")]
            Threads::Current(_) => (0..tasks).into_par_iter().with_max_len(1).for_each(task),
            #[cfg(feature = "rayon")]
            Threads::Pool(pool) => pool.install(|| (0..tasks).into_par_iter().with_max_len(1).for_each(task)),
        }
    }

    /// As [`for_each`](Self::for_each), with `len` elements of scratch and what `start` makes of them for each thread; there is scratch for
    /// one thread at least. Tasks are started in order, by whichever thread is free.
    pub(crate) fn for_each_with<'a, W>(
        &self,
        tasks: usize,
        work: usize,
        scratch: &'a mut [f64],
        len: usize,
        start: impl Fn(&'a mut [f64]) -> W + Send + Sync,
        task: impl Fn(&mut W, usize) + Send + Sync,
    ) {
        let room = scratch.len() / len.max(1);
        let workers = if work < SPREAD { 1 } else { self.count().min(room).min(tasks) };
        debug_assert!(workers < 2 || cfg!(feature = "rayon"));
        #[cfg(feature = "rayon")]
        if workers > 1 {
            let next = AtomicUsize::new(0);
            let run = |scratch: &'a mut [f64]| {
                let mut worker = start(scratch);
                while let Some(index) = Some(next.fetch_add(1, Relaxed)).filter(|index| *index < tasks) {
                    task(&mut worker, index);
                }
            };
            let workers = scratch.par_chunks_exact_mut(len).take(workers).with_max_len(1);
            return match self {
                Threads::Pool(pool) => pool.install(|| workers.for_each(run)),
                _ => workers.for_each(run),
            };
        }
        let mut worker = start(&mut scratch[..len]);
        (0..tasks).for_each(|index| task(&mut worker, index));
    }
}
