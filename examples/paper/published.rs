//! What Oursland 2026 (arXiv 2601.06478) publishes for MNIST: H = 64, batches of 128, 100 epochs.

/// A published value.
#[derive(Debug, Clone, Copy)]
pub struct Published {
    /// Mean over the paper's seeds.
    pub mean: f64,
    /// Standard deviation over the paper's seeds, where one is given.
    pub deviation: Option<f64>,
    /// Decimals that are given.
    pub decimals: usize,
}

const fn plain(mean: f64, decimals: usize) -> Option<Published> {
    Some(Published { mean, deviation: None, decimals })
}

const fn with(mean: f64, deviation: f64, decimals: usize) -> Option<Published> {
    Some(Published { mean, deviation: Some(deviation), decimals })
}

impl Published {
    /// What a difference is measured in: the published deviation, but not less than half a unit of the last decimal, which is as
    /// much as the rounding of the mean can hide.
    pub fn scale(&self) -> Option<f64> {
        self.deviation.map(|deviation| deviation.max(0.5 * 0.1f64.powi(self.decimals as i32)))
    }
}

/// A configuration of the ablation: which terms are on, and dead units, redundancy and entropy.
pub struct Ablation {
    /// Name.
    pub name: &'static str,
    /// λ_lse, λ_var, λ_tc.
    pub lambdas: [f64; 3],
    /// Of 64.
    pub dead_units: Option<Published>,
    /// Σ_{i≠j} C_ij².
    pub redundancy: Option<Published>,
    /// In nats.
    pub entropy: Option<Published>,
}

/// The ablation, over 3 seeds.
pub const ABLATION: [Ablation; 4] = [
    Ablation {
        name: "LSE only",
        lambdas: [1.0, 0.0, 0.0],
        dead_units: plain(64.0, 0),
        redundancy: None,
        entropy: plain(4.16, 2),
    },
    Ablation {
        name: "LSE + var",
        lambdas: [1.0, 1.0, 0.0],
        dead_units: plain(0.0, 0),
        redundancy: plain(1875.0, 0),
        entropy: plain(3.77, 2),
    },
    Ablation {
        name: "LSE + var + tc",
        lambdas: [1.0, 1.0, 1.0],
        dead_units: plain(0.0, 0),
        redundancy: plain(29.0, 0),
        entropy: plain(3.85, 2),
    },
    Ablation {
        name: "var + tc",
        lambdas: [0.0, 1.0, 1.0],
        dead_units: plain(0.0, 0),
        redundancy: plain(28.0, 0),
        entropy: plain(1.99, 2),
    },
];

/// A model of the benchmark.
pub struct Benchmark {
    /// Name.
    pub name: &'static str,
    /// Test accuracy in percent.
    pub probe: Option<Published>,
    /// Of 64.
    pub l0: Option<Published>,
    /// Mean squared error of the reconstruction.
    pub reconstruction: Option<Published>,
    /// Number of parameters.
    pub parameters: Option<Published>,
}

/// The benchmark, over 5 seeds: the decoder-free model, then the standard one.
pub const BENCHMARK: [Benchmark; 2] = [
    Benchmark {
        name: "decoder-free",
        probe: with(93.43, 0.38, 2),
        l0: plain(17.2, 1),
        reconstruction: plain(0.143, 3),
        parameters: plain(50_240.0, 0),
    },
    Benchmark {
        name: "standard SAE",
        probe: with(90.26, 0.32, 2),
        l0: plain(32.2, 1),
        reconstruction: plain(0.026, 3),
        parameters: plain(101_200.0, 0),
    },
];

/// An optimiser's learning rate.
pub struct Sweep {
    /// Whether Adam or plain gradient descent.
    pub adam: bool,
    /// Learning rate.
    pub rate: f64,
    /// Total loss of a batch of 128, summed over rows; mean over the last epoch.
    pub loss: Option<Published>,
    /// Test accuracy in percent.
    pub probe: Option<Published>,
}

const fn sweep(adam: bool, rate: f64, loss: (f64, f64), probe: (f64, f64)) -> Sweep {
    Sweep { adam, rate, loss: with(loss.0, loss.1, 0), probe: with(probe.0, probe.1, 1) }
}

/// The sweep over optimisers, over 3 seeds.
pub const SWEEP: [Sweep; 8] = [
    sweep(false, 1e-4, (-520.0, 1.0), (92.2, 0.3)),
    sweep(false, 1e-3, (-676.0, 0.0), (92.6, 0.2)),
    sweep(false, 1e-2, (-795.0, 29.0), (93.6, 0.1)),
    sweep(false, 1e-1, (-967.0, 18.0), (93.5, 0.1)),
    sweep(true, 1e-4, (-745.0, 2.0), (92.9, 0.0)),
    sweep(true, 1e-3, (-999.0, 1.0), (93.5, 0.4)),
    sweep(true, 1e-2, (-1215.0, 21.0), (93.5, 0.2)),
    sweep(true, 1e-1, (-1420.0, 13.0), (93.1, 0.2)),
];
