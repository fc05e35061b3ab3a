//! The decoder-free objective's configuration and the plain values of its terms.

use crate::error::{Error, Result};

/// What is applied to z = x Wᵀ + b.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Activation {
    /// max(z, 0); NaN stays NaN.
    #[default]
    Relu,
    /// z.
    Identity,
    /// log(1 + exp z).
    Softplus,
}

/// How the log-sum-exp term is reduced over the rows of the batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reduction {
    /// Σ_n ℓ_n, as in the paper.
    #[default]
    Sum,
    /// (1/N) Σ_n ℓ_n.
    Mean,
}

/// How a statistic that has an H×H form and a smaller dual form is computed. Both are exact; they differ in cost and memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Form {
    /// The cheaper one.
    #[default]
    Auto,
    /// Over pairs of latents: the H×H matrix.
    Primal,
    /// Over pairs of rows (correlation: N×N) or of inputs (weight redundancy: D×D).
    Dual,
}

impl Form {
    /// Whether the dual is used for `latents` latents and a dual matrix of `dual` rows.
    ///
    /// Both forms do the same three half-products (one symmetric, one full), 3·N·H·min(N, H) multiply-adds, so the smaller matrix wins.
    pub fn is_dual(self, latents: usize, dual: usize) -> bool {
        match self {
            Form::Auto => dual < latents,
            Form::Primal => false,
            Form::Dual => true,
        }
    }
}

/// Weights of the terms of the decoder-free objective (Oursland 2026, arXiv 2601.06478)
///
/// L = λ_lse·L_lse + λ_var·L_var + λ_tc·L_tc + λ_wr·L_wr
///
/// with L_lse = −Σ_n log Σ_j exp(−a_nj), L_var = −Σ_j log(v_j + ε), L_tc = Σ_{i≠j} C_ij², L_wr = ‖Ŵ Ŵᵀ − I‖_F².
/// The default is the paper's: 1, 1, 1, 0, ε = 1e-6, summed over rows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Objective {
    /// Weight of the log-sum-exp term.
    pub lambda_lse: f64,
    /// Weight of the variance term.
    pub lambda_var: f64,
    /// Weight of the (total) correlation term.
    pub lambda_tc: f64,
    /// Weight of the weight-redundancy term.
    pub lambda_wr: f64,
    /// ε in log(v + ε).
    pub variance_eps: f64,
    /// Sum (the paper's) or mean over rows, of the log-sum-exp term alone.
    pub reduction: Reduction,
    /// Whether the weight-redundancy term normalises W's rows first (the authors' code does; their derivation also writes it without).
    pub normalize_weight: bool,
}

impl Default for Objective {
    fn default() -> Self {
        Self {
            lambda_lse: 1.0,
            lambda_var: 1.0,
            lambda_tc: 1.0,
            lambda_wr: 0.0,
            variance_eps: 1e-6,
            reduction: Reduction::Sum,
            normalize_weight: true,
        }
    }
}

impl Objective {
    /// # Errors
    /// [`Error::Configuration`] where a weight is not finite or ε is not positive.
    pub fn check(&self) -> Result<()> {
        for (name, value) in [
            ("lambda_lse", self.lambda_lse),
            ("lambda_var", self.lambda_var),
            ("lambda_tc", self.lambda_tc),
            ("lambda_wr", self.lambda_wr),
        ] {
            if !value.is_finite() {
                return Err(Error::Configuration { name, value, requirement: "finite" });
            }
        }
        if !(self.variance_eps > 0.0 && self.variance_eps.is_finite()) {
            return Err(Error::Configuration {
                name: "variance_eps",
                value: self.variance_eps,
                requirement: "positive and finite",
            });
        }
        Ok(())
    }

    /// Whether a term needs the batch's variance.
    pub fn needs_statistics(&self) -> bool {
        self.lambda_var != 0.0 || self.lambda_tc != 0.0
    }

    /// Weight of one row's ℓ_n in the loss, for a batch of `rows` rows.
    pub fn row_weight(&self, rows: u64) -> f64 {
        match self.reduction {
            Reduction::Sum => self.lambda_lse,
            Reduction::Mean => self.lambda_lse / rows.max(1) as f64,
        }
    }
}

/// Values of the terms of an [`Objective`], not yet multiplied by their weights, and their weighted sum.
///
/// Terms whose weight is 0 are not computed and read 0.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Losses {
    /// Σ_n ℓ_n, or the mean.
    pub lse: f64,
    /// −Σ_j log(v_j + ε).
    pub var: f64,
    /// Σ_{i≠j} C_ij².
    pub tc: f64,
    /// ‖Ŵ Ŵᵀ − I‖_F².
    pub wr: f64,
    /// The weighted sum.
    pub total: f64,
}
