//! What the tests share.
#![allow(dead_code)]

use ptx_emulator::{Asynchronous, Module, Options, Rounding, Schedule};

pub fn module(ptx: &str) -> Module {
    Module::parse(ptx).unwrap_or_else(|e| panic!("{e}"))
}

/// Three schedules, each with its own idea of asynchronous work, with and without preemption.
pub fn all_options() -> Vec<Options> {
    let mut all = Vec::new();
    for (schedule, preemption) in [
        (Schedule::FirstIn, None),
        (Schedule::LastIn, None),
        (Schedule::Random(7), None),
        (Schedule::Random(8), Some(20)),
    ] {
        for asynchronous in [Asynchronous::Late, Asynchronous::AtOnce, Asynchronous::Random] {
            all.push(Options { schedule, asynchronous, preemption, ..Options::default() });
        }
    }
    all
}

pub const ROUNDINGS: [Rounding; 3] = [Rounding::F32, Rounding::Exact, Rounding::Truncate];

/// Numbers in −1..1 that are the same everywhere.
pub struct Random(pub u64);

impl Random {
    pub fn unit(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}
