//! Each operation of the table as plain data in, plain data out: inputs are rounded to the backend's types, outputs and workspace
//! start as NaN inside red zones, the workspace has exactly the length asked for, and everything comes back widened to `f64`.

use super::{Guarded, HostBackend, Place, Under};
use sae_kernels::operations::{
    self, CorrelationTerm, Covariance as CovarianceOf, Layout, Moments, PrimalCorrelation, StatisticsTerm,
};
use sae_kernels::{Activation, Element, Form, Objective, Shape, Statistics};

type RealOf<B> = <B as sae_kernels::Backend>::Real;
type ElementOf<B> = <B as sae_kernels::Backend>::Element;

/// A NaN-filled workspace of exactly the length that the backend asks for.
pub fn workspace<B: HostBackend>(under: &Under<B>, rows: usize, inputs: usize, latents: usize) -> Guarded<f64> {
    workspace_at(under, Place::DENSE, rows, inputs, latents)
}

/// As [`workspace`], where `place` says.
fn workspace_at<B: HostBackend>(
    under: &Under<B>,
    place: Place,
    rows: usize,
    inputs: usize,
    latents: usize,
) -> Guarded<f64> {
    let len = under.backend.workspace_len(Shape { rows, inputs, latents }).unwrap();
    Guarded::vector_or_poison(place, len, None)
}

/// Row loss sum, sums and sums of squares.
pub type MomentSums = (f64, Vec<f64>, Vec<f64>);

#[derive(Debug, Clone)]
pub struct Encode {
    pub n: usize,
    pub d: usize,
    pub h: usize,
    pub x: Vec<f64>,
    pub weight: Vec<f64>,
    pub bias: Vec<f64>,
    pub activation: Activation,
    pub shift: Option<Vec<f64>>,
    /// What is added to.
    pub before: Option<MomentSums>,
    /// Which of activations, row losses and moments are wanted.
    pub wanted: [bool; 3],
}

/// What was not wanted is empty.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Encoded {
    pub activations: Vec<f64>,
    pub row_loss: Vec<f64>,
    pub row_loss_sum: Vec<f64>,
    pub sum: Vec<f64>,
    pub sum_squares: Vec<f64>,
}

impl Encode {
    pub fn run<B: HostBackend>(&self, under: &Under<B>, place: Place) -> Encoded {
        let Self { n, d, h, .. } = *self;
        let context = format!("{}: encode {n}×{d}×{h} {:?} {place:?}", under.name, self.activation);
        let x = Guarded::<ElementOf<B>>::matrix(place, n, d, &self.x);
        let weight = Guarded::<ElementOf<B>>::matrix(place, h, d, &self.weight);
        let bias = Guarded::<RealOf<B>>::vector(place, &self.bias);
        let shift = self.shift.as_ref().map(|shift| Guarded::<RealOf<B>>::vector(place, shift));
        let mut activations = Guarded::<ElementOf<B>>::poisoned(place, n, h);
        let mut row_loss = Guarded::<RealOf<B>>::vector_or_poison(place, n, None);
        let before = self.before.as_ref();
        let total = before.map(|b| [b.0]);
        let mut row_loss_sum = Guarded::<f64>::vector_or_poison(place, 1, total.as_ref().map(|t| t.as_slice()));
        let mut sum = Guarded::<f64>::vector_or_poison(place, h, before.map(|b| b.1.as_slice()));
        let mut sum_squares = Guarded::<f64>::vector_or_poison(place, h, before.map(|b| b.2.as_slice()));
        let mut scratch = workspace_at(under, place, n, d, h);
        let [want_activations, want_row_loss, want_moments] = self.wanted;
        under
            .backend
            .encode(operations::Encode {
                x: x.mat(),
                weight: weight.mat(),
                bias: bias.slice(),
                activation: self.activation,
                activations: want_activations.then(|| activations.mat_mut()),
                row_loss: want_row_loss.then(|| row_loss.slice_mut()),
                moments: want_moments.then(|| Moments {
                    shift: shift.as_ref().map(|s| s.slice()),
                    accumulate: before.is_some(),
                    row_loss_sum: row_loss_sum.slice_mut(),
                    sum: sum.slice_mut(),
                    sum_squares: sum_squares.slice_mut(),
                }),
                workspace: scratch.slice_mut(),
            })
            .unwrap_or_else(|e| panic!("{context}: {e}"));
        scratch.checked(&context, "the workspace");
        Encoded {
            activations: keep(want_activations, activations.checked(&context, "activations")),
            row_loss: keep(want_row_loss, row_loss.checked(&context, "row_loss")),
            row_loss_sum: keep(want_moments, row_loss_sum.checked(&context, "row_loss_sum")),
            sum: keep(want_moments, sum.checked(&context, "sum")),
            sum_squares: keep(want_moments, sum_squares.checked(&context, "sum_squares")),
        }
    }
}

/// [`operations::ActivationSums`]; its outcome has no activations.
#[derive(Debug, Clone)]
pub struct ActivationSums {
    pub n: usize,
    pub h: usize,
    pub activations: Vec<f64>,
    pub shift: Option<Vec<f64>>,
    /// What is added to.
    pub before: Option<MomentSums>,
    /// Whether row losses and moments are wanted.
    pub wanted: [bool; 2],
}

impl ActivationSums {
    pub fn run<B: HostBackend>(&self, under: &Under<B>, place: Place) -> Encoded {
        let Self { n, h, .. } = *self;
        let context = format!("{}: activation_sums {n}×{h} {place:?}", under.name);
        let activations = Guarded::<ElementOf<B>>::matrix(place, n, h, &self.activations);
        let shift = self.shift.as_ref().map(|shift| Guarded::<RealOf<B>>::vector(place, shift));
        let mut row_loss = Guarded::<RealOf<B>>::vector_or_poison(place, n, None);
        let before = self.before.as_ref();
        let total = before.map(|b| [b.0]);
        let mut row_loss_sum = Guarded::<f64>::vector_or_poison(place, 1, total.as_ref().map(|t| t.as_slice()));
        let mut sum = Guarded::<f64>::vector_or_poison(place, h, before.map(|b| b.1.as_slice()));
        let mut sum_squares = Guarded::<f64>::vector_or_poison(place, h, before.map(|b| b.2.as_slice()));
        let mut scratch = workspace_at(under, place, n, 0, h);
        let [want_row_loss, want_moments] = self.wanted;
        under
            .backend
            .activation_sums(operations::ActivationSums {
                activations: activations.mat(),
                row_loss: want_row_loss.then(|| row_loss.slice_mut()),
                moments: want_moments.then(|| Moments {
                    shift: shift.as_ref().map(|s| s.slice()),
                    accumulate: before.is_some(),
                    row_loss_sum: row_loss_sum.slice_mut(),
                    sum: sum.slice_mut(),
                    sum_squares: sum_squares.slice_mut(),
                }),
                workspace: scratch.slice_mut(),
            })
            .unwrap_or_else(|e| panic!("{context}: {e}"));
        scratch.checked(&context, "the workspace");
        Encoded {
            activations: Vec::new(),
            row_loss: keep(want_row_loss, row_loss.checked(&context, "row_loss")),
            row_loss_sum: keep(want_moments, row_loss_sum.checked(&context, "row_loss_sum")),
            sum: keep(want_moments, sum.checked(&context, "sum")),
            sum_squares: keep(want_moments, sum_squares.checked(&context, "sum_squares")),
        }
    }
}

fn keep(wanted: bool, values: Vec<f64>) -> Vec<f64> {
    if wanted { values } else { Vec::new() }
}

pub fn responsibilities<B: HostBackend>(
    under: &Under<B>,
    place: Place,
    (n, h): (usize, usize),
    activations: &[f64],
    row_loss: &[f64],
) -> Vec<f64> {
    let context = format!("{}: responsibilities {n}×{h} {place:?}", under.name);
    let activations = Guarded::<ElementOf<B>>::matrix(place, n, h, activations);
    let row_loss = Guarded::<RealOf<B>>::vector(place, row_loss);
    let mut out = Guarded::<RealOf<B>>::poisoned(place, n, h);
    under
        .backend
        .responsibilities(operations::Responsibilities {
            activations: activations.mat(),
            row_loss: row_loss.slice(),
            responsibilities: out.mat_mut(),
        })
        .unwrap_or_else(|e| panic!("{context}: {e}"));
    out.checked(&context, "responsibilities")
}

/// Returns (shift, sum, sum_squares).
pub fn recentre<B: HostBackend>(
    under: &Under<B>,
    place: Place,
    (n, h): (usize, usize),
    activations: &[f64],
    sum: &[f64],
    sum_squares: &[f64],
) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let context = format!("{}: recentre {n}×{h} {place:?}", under.name);
    let activations = Guarded::<ElementOf<B>>::matrix(place, n, h, activations);
    let mut shift = Guarded::<RealOf<B>>::vector_or_poison(place, h, None);
    let mut sum = Guarded::<f64>::vector(place, sum);
    let mut sum_squares = Guarded::<f64>::vector(place, sum_squares);
    under
        .backend
        .recentre(operations::Recentre {
            activations: activations.mat(),
            shift: shift.slice_mut(),
            sum: sum.slice_mut(),
            sum_squares: sum_squares.slice_mut(),
        })
        .unwrap_or_else(|e| panic!("{context}: {e}"));
    (shift.checked(&context, "shift"), sum.checked(&context, "sum"), sum_squares.checked(&context, "sum_squares"))
}

/// A block's moments and, if there are any, comoments about `shift`.
#[derive(Debug, Clone)]
pub struct Block {
    pub count: u64,
    pub row_loss_sum: f64,
    pub shift: Vec<f64>,
    pub sum: Vec<f64>,
    pub sum_squares: Vec<f64>,
    pub comoments: Option<Vec<f64>>,
}

impl Block {
    /// [`operations::PackStatistics`]; `before` is added to if given.
    pub fn pack<B: HostBackend>(
        &self,
        under: &Under<B>,
        place: Place,
        packed_shift: Option<&[f64]>,
        before: Option<&[f64]>,
    ) -> Vec<f64> {
        let h = self.shift.len();
        let context = format!("{}: pack_statistics of {h} {place:?}", under.name);
        let row_loss_sum = Guarded::<f64>::vector(place, &[self.row_loss_sum]);
        let shift = Guarded::<RealOf<B>>::vector(place, &self.shift);
        let (sum, sum_squares) =
            (Guarded::<f64>::vector(place, &self.sum), Guarded::<f64>::vector(place, &self.sum_squares));
        let comoments = self.comoments.as_ref().map(|all| Guarded::<RealOf<B>>::matrix(place, h, h, all));
        let packed_shift = packed_shift.map(|shift| Guarded::<RealOf<B>>::vector(place, shift));
        let mut packed = Guarded::<f64>::vector_or_poison(place, Statistics::len(h, comoments.is_some()), before);
        under
            .backend
            .pack_statistics(operations::PackStatistics {
                count: self.count,
                row_loss_sum: row_loss_sum.slice(),
                shift: shift.slice(),
                sum: sum.slice(),
                sum_squares: sum_squares.slice(),
                comoments: comoments.as_ref().map(|comoments| comoments.mat()),
                packed_shift: packed_shift.as_ref().map(|shift| shift.slice()),
                accumulate: before.is_some(),
                packed: packed.slice_mut(),
            })
            .unwrap_or_else(|e| panic!("{context}: {e}"));
        packed.checked(&context, "packed")
    }

    /// [`operations::UnpackStatistics`]; the lower triangle must stay as it was, and comes back as 0.
    pub fn unpack<B: HostBackend>(
        under: &Under<B>,
        place: Place,
        packed: &[f64],
        packed_shift: Option<&[f64]>,
        h: usize,
        wants_comoments: bool,
    ) -> Self {
        let context = format!("{}: unpack_statistics of {h} {place:?}", under.name);
        let count = packed[0] as u64;
        let packed = Guarded::<f64>::vector(place, packed);
        let packed_shift = packed_shift.map(|shift| Guarded::<RealOf<B>>::vector(place, shift));
        let mut row_loss_sum = Guarded::<f64>::vector_or_poison(place, 1, None);
        let mut shift = Guarded::<RealOf<B>>::vector_or_poison(place, h, None);
        let mut sum = Guarded::<f64>::vector_or_poison(place, h, None);
        let mut sum_squares = Guarded::<f64>::vector_or_poison(place, h, None);
        let mut comoments = wants_comoments.then(|| Guarded::<RealOf<B>>::poisoned(place, h, h));
        let lower = comoments.as_ref().map(|comoments| lower_triangle(h, &comoments.values()));
        under
            .backend
            .unpack_statistics(operations::UnpackStatistics {
                packed: packed.slice(),
                packed_shift: packed_shift.as_ref().map(|shift| shift.slice()),
                row_loss_sum: row_loss_sum.slice_mut(),
                shift: shift.slice_mut(),
                sum: sum.slice_mut(),
                sum_squares: sum_squares.slice_mut(),
                comoments: comoments.as_mut().map(|comoments| comoments.mat_mut()),
            })
            .unwrap_or_else(|e| panic!("{context}: {e}"));
        Self {
            count,
            row_loss_sum: row_loss_sum.checked(&context, "row_loss_sum")[0],
            shift: shift.checked(&context, "shift"),
            sum: sum.checked(&context, "sum"),
            sum_squares: sum_squares.checked(&context, "sum_squares"),
            comoments: comoments.zip(lower).map(|(comoments, lower)| {
                let comoments = comoments.checked(&context, "comoments");
                super::assert_same_bits(&context, "the lower triangle", &lower_triangle(h, &comoments), &lower);
                upper_triangle(h, &comoments)
            }),
        }
    }
}

/// `before` is added to if given; the lower triangle must stay as it was.
pub fn comoments<B: HostBackend>(
    under: &Under<B>,
    place: Place,
    (n, h): (usize, usize),
    activations: &[f64],
    shift: &[f64],
    before: Option<&[f64]>,
) -> Vec<f64> {
    let context = format!("{}: comoments {n}×{h} {place:?}", under.name);
    let activations = Guarded::<ElementOf<B>>::matrix(place, n, h, activations);
    let shift = Guarded::<RealOf<B>>::vector(place, shift);
    let mut out = Guarded::<RealOf<B>>::matrix_or_poison(place, h, h, before);
    let mut scratch = workspace_at(under, place, n, 0, h);
    let lower = lower_triangle(h, &out.values());
    under
        .backend
        .comoments(operations::Comoments {
            activations: activations.mat(),
            shift: shift.slice(),
            accumulate: before.is_some(),
            comoments: out.mat_mut(),
            workspace: scratch.slice_mut(),
        })
        .unwrap_or_else(|e| panic!("{context}: {e}"));
    scratch.checked(&context, "the workspace");
    let out = out.checked(&context, "comoments");
    super::assert_same_bits(&context, "the lower triangle", &lower_triangle(h, &out), &lower);
    upper_triangle(h, &out)
}

fn lower_triangle(h: usize, matrix: &[f64]) -> Vec<f64> {
    (0..h * h).filter(|at| at % h < at / h).map(|at| matrix[at]).collect()
}

/// The matrix with zeros below its diagonal.
pub fn upper_triangle(h: usize, matrix: &[f64]) -> Vec<f64> {
    (0..h * h).map(|at| if at % h < at / h { 0.0 } else { matrix[at] }).collect()
}

/// Where the covariances of [`Finish`] come from.
#[derive(Debug, Clone, PartialEq)]
pub enum Covariance {
    None,
    /// [H,H], upper triangle.
    Comoments(Vec<f64>),
    /// [N,H].
    Activations(Vec<f64>),
}

#[derive(Debug, Clone)]
pub struct Finish {
    pub h: usize,
    pub count: u64,
    pub objective: Objective,
    pub shift: Vec<f64>,
    pub sum: Vec<f64>,
    pub sum_squares: Vec<f64>,
    pub covariance: Covariance,
}

/// Coupling and offset are empty without covariances.
#[derive(Debug, Clone, PartialEq)]
pub struct Finished {
    pub mean: Vec<f64>,
    pub variance: Vec<f64>,
    pub scale: Vec<f64>,
    pub losses: Vec<f64>,
    pub coupling: Vec<f64>,
    pub offset: Vec<f64>,
}

impl Finish {
    pub fn run<B: HostBackend>(&self, under: &Under<B>, place: Place) -> Finished {
        let h = self.h;
        let (none, given) = (Vec::new(), &self.covariance);
        let (primal, activations) = match given {
            Covariance::None => (false, &none),
            Covariance::Comoments(_) => (true, &none),
            Covariance::Activations(activations) => (true, activations),
        };
        let n = activations.len() / h;
        let context = format!("{}: finish_statistics of {n}×{h}, primal {primal}, {place:?}", under.name);
        let activations = Guarded::<B::Element>::matrix(place, n, h, activations);
        let shift = Guarded::<RealOf<B>>::vector(place, &self.shift);
        let sum = Guarded::<f64>::vector(place, &self.sum);
        let sum_squares = Guarded::<f64>::vector(place, &self.sum_squares);
        // What lies below the diagonal is not to be read.
        let mut coupling = Guarded::<RealOf<B>>::poisoned(place, h, h);
        if let Covariance::Comoments(values) = given {
            for i in 0..h {
                for j in i..h {
                    coupling.mat_mut().row_mut(i)[j] = RealOf::<B>::from_f64(values[i * h + j]);
                }
            }
        }
        let mut offset = Guarded::<RealOf<B>>::vector_or_poison(place, h, None);
        let mut mean = Guarded::<RealOf<B>>::vector_or_poison(place, h, None);
        let mut variance = Guarded::<RealOf<B>>::vector_or_poison(place, h, None);
        let mut scale = Guarded::<RealOf<B>>::vector_or_poison(place, h, None);
        let mut losses = Guarded::<f64>::vector_or_poison(place, 2, None);
        let mut scratch = workspace_at(under, place, n, 0, h);
        under
            .backend
            .finish_statistics(operations::FinishStatistics {
                count: self.count,
                objective: self.objective,
                shift: shift.slice(),
                sum: sum.slice(),
                sum_squares: sum_squares.slice(),
                primal: primal.then(|| PrimalCorrelation {
                    covariance: match given {
                        Covariance::Activations(_) => CovarianceOf::Activations(activations.mat()),
                        _ => CovarianceOf::InPlace,
                    },
                    coupling: coupling.mat_mut(),
                    offset: offset.slice_mut(),
                }),
                mean: mean.slice_mut(),
                variance: variance.slice_mut(),
                scale: scale.slice_mut(),
                losses: losses.slice_mut(),
                workspace: scratch.slice_mut(),
            })
            .unwrap_or_else(|e| panic!("{context}: {e}"));
        scratch.checked(&context, "the workspace");
        Finished {
            mean: mean.checked(&context, "mean"),
            variance: variance.checked(&context, "variance"),
            scale: scale.checked(&context, "scale"),
            losses: losses.checked(&context, "losses"),
            coupling: keep(primal, coupling.checked(&context, "coupling")),
            offset: keep(primal, offset.checked(&context, "offset")),
        }
    }
}

#[derive(Debug, Clone)]
pub struct Dual {
    pub n: usize,
    pub h: usize,
    pub activations: Vec<f64>,
    pub mean: Vec<f64>,
    pub variance: Vec<f64>,
    pub lambda_tc: f64,
    pub scale: Vec<f64>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct DualOut {
    pub gram: Vec<f64>,
    pub product: Vec<f64>,
    pub scale: Vec<f64>,
    pub loss: Vec<f64>,
}

impl Dual {
    pub fn run<B: HostBackend>(&self, under: &Under<B>, place: Place) -> DualOut {
        let Self { n, h, .. } = *self;
        let context = format!("{}: correlation_dual {n}×{h} {place:?}", under.name);
        let activations = Guarded::<ElementOf<B>>::matrix(place, n, h, &self.activations);
        let mean = Guarded::<RealOf<B>>::vector(place, &self.mean);
        let variance = Guarded::<RealOf<B>>::vector(place, &self.variance);
        let mut gram = Guarded::<RealOf<B>>::poisoned(place, n, n);
        let mut product = Guarded::<ElementOf<B>>::poisoned(place, n, h);
        let mut scale = Guarded::<RealOf<B>>::vector(place, &self.scale);
        let mut loss = Guarded::<f64>::vector_or_poison(place, 1, None);
        let mut scratch = workspace_at(under, place, n, 0, h);
        under
            .backend
            .correlation_dual(operations::CorrelationDual {
                activations: activations.mat(),
                mean: mean.slice(),
                variance: variance.slice(),
                lambda_tc: self.lambda_tc,
                gram: gram.mat_mut(),
                product: product.mat_mut(),
                scale: scale.slice_mut(),
                loss: loss.slice_mut(),
                workspace: scratch.slice_mut(),
            })
            .unwrap_or_else(|e| panic!("{context}: {e}"));
        scratch.checked(&context, "the workspace");
        DualOut {
            gram: gram.checked(&context, "gram"),
            product: product.checked(&context, "product"),
            scale: scale.checked(&context, "scale"),
            loss: loss.checked(&context, "loss"),
        }
    }
}

/// The statistics' part of [`Backward`].
#[derive(Debug, Clone)]
pub struct StatisticsPart {
    pub mean: Vec<f64>,
    pub scale: Vec<f64>,
    pub correlation: Correlation,
}

#[derive(Debug, Clone)]
pub enum Correlation {
    None,
    Primal { coupling: Vec<f64>, offset: Vec<f64> },
    Dual { product: Vec<f64> },
}

#[derive(Debug, Clone)]
pub struct Backward {
    pub n: usize,
    pub h: usize,
    pub activations: Vec<f64>,
    pub activation: Activation,
    pub row_loss: Vec<f64>,
    pub row_weight: f64,
    pub statistics: Option<StatisticsPart>,
    /// Bias gradient to add to.
    pub before: Option<Vec<f64>>,
}

impl Backward {
    /// Returns (dz, grad_bias).
    pub fn run<B: HostBackend>(&self, under: &Under<B>, place: Place) -> (Vec<f64>, Vec<f64>) {
        let Self { n, h, .. } = *self;
        let context = format!("{}: backward_dz {n}×{h} {:?} {place:?}", under.name, self.activation);
        let activations = Guarded::<ElementOf<B>>::matrix(place, n, h, &self.activations);
        let row_loss = Guarded::<RealOf<B>>::vector(place, &self.row_loss);
        let real = |values: &[f64]| Guarded::<RealOf<B>>::vector(place, values);
        let (mean, scale) =
            self.statistics.as_ref().map_or((real(&[]), real(&[])), |s| (real(&s.mean), real(&s.scale)));
        let (coupling, offset, product) = match self.statistics.as_ref().map(|s| &s.correlation) {
            Some(Correlation::Primal { coupling, offset }) => (Some(coupling), offset.as_slice(), None),
            Some(Correlation::Dual { product }) => (None, [].as_slice(), Some(product.as_slice())),
            Some(Correlation::None) | None => (None, [].as_slice(), None),
        };
        let coupling = coupling.map(|m| Guarded::<RealOf<B>>::matrix(place, h, h, m));
        let offset = real(offset);
        let mut dz = Guarded::<ElementOf<B>>::matrix_or_poison(place, n, h, product);
        let mut grad_bias = Guarded::<RealOf<B>>::vector_or_poison(place, h, self.before.as_deref());
        let mut scratch = workspace_at(under, place, n, 0, h);
        under
            .backend
            .backward_dz(operations::BackwardDz {
                activations: activations.mat(),
                activation: self.activation,
                row_loss: row_loss.slice(),
                row_weight: self.row_weight,
                statistics: self.statistics.as_ref().map(|s| StatisticsTerm {
                    mean: mean.slice(),
                    scale: scale.slice(),
                    correlation: match (&s.correlation, &coupling) {
                        (Correlation::Primal { .. }, Some(coupling)) => {
                            CorrelationTerm::Primal { coupling: coupling.mat(), offset: offset.slice() }
                        }
                        (Correlation::Dual { .. }, _) => CorrelationTerm::Dual,
                        _ => CorrelationTerm::None,
                    },
                }),
                dz: dz.mat_mut(),
                accumulate: self.before.is_some(),
                grad_bias: grad_bias.slice_mut(),
                workspace: scratch.slice_mut(),
            })
            .unwrap_or_else(|e| panic!("{context}: {e}"));
        scratch.checked(&context, "the workspace");
        (dz.checked(&context, "dz"), grad_bias.checked(&context, "grad_bias"))
    }
}

/// The shape within which a product m×n×k stands, by its layout: dx = dZ W, z = x Wᵀ, dW = dZᵀ x.
fn product_shape(layout: Layout, m: usize, n: usize, k: usize) -> [usize; 3] {
    match layout {
        Layout::Nn => [m, n, k],
        Layout::Nt => [m, k, n],
        Layout::Tn => [k, n, m],
    }
}

/// `left` is [m,k] and `right` [n,k] whatever the layout; they are laid out as it says. `before` is added to, if given.
pub fn product<B: HostBackend>(
    under: &Under<B>,
    place: Place,
    layout: Layout,
    [m, n, k]: [usize; 3],
    left: &[f64],
    right: &[f64],
    before: Option<&[f64]>,
) -> Vec<f64> {
    let context = format!("{}: product {layout:?} {m}×{n}×{k} {place:?}", under.name);
    let left = match layout {
        Layout::Nn | Layout::Nt => Guarded::<ElementOf<B>>::matrix(place, m, k, left),
        Layout::Tn => Guarded::<ElementOf<B>>::matrix(place, k, m, &super::transposed(m, k, left)),
    };
    let right = match layout {
        Layout::Nt => Guarded::<ElementOf<B>>::matrix(place, n, k, right),
        Layout::Nn | Layout::Tn => Guarded::<ElementOf<B>>::matrix(place, k, n, &super::transposed(n, k, right)),
    };
    let mut out = Guarded::<RealOf<B>>::matrix_or_poison(place, m, n, before);
    let [rows, inputs, latents] = product_shape(layout, m, n, k);
    let mut scratch = workspace_at(under, place, rows, inputs, latents);
    under
        .backend
        .product(operations::Product {
            layout,
            left: left.mat(),
            right: right.mat(),
            accumulate: before.is_some(),
            out: out.mat_mut(),
            workspace: scratch.slice_mut(),
        })
        .unwrap_or_else(|e| panic!("{context}: {e}"));
    scratch.checked(&context, "the workspace");
    out.checked(&context, "out")
}

pub fn column_sums<B: HostBackend>(
    under: &Under<B>,
    place: Place,
    (n, h): (usize, usize),
    matrix: &[f64],
    before: Option<&[f64]>,
) -> Vec<f64> {
    let context = format!("{}: column_sums {n}×{h} {place:?}", under.name);
    let matrix = Guarded::<ElementOf<B>>::matrix(place, n, h, matrix);
    let mut sums = Guarded::<RealOf<B>>::vector_or_poison(place, h, before);
    // The columns may be latents, or inputs as in the gradient of a decoder's bias.
    let mut scratch =
        if h % 2 == 0 { workspace_at(under, place, n, 0, h) } else { workspace_at(under, place, n, h, 1) };
    under
        .backend
        .column_sums(operations::ColumnSums {
            matrix: matrix.mat(),
            accumulate: before.is_some(),
            sums: sums.slice_mut(),
            workspace: scratch.slice_mut(),
        })
        .unwrap_or_else(|e| panic!("{context}: {e}"));
    scratch.checked(&context, "the workspace");
    sums.checked(&context, "sums")
}

#[derive(Debug, Clone)]
pub struct Redundancy {
    pub h: usize,
    pub d: usize,
    pub weight: Vec<f64>,
    pub normalize: bool,
    pub form: Form,
    pub lambda: f64,
    /// Gradient to add to; not wanted if `None`.
    pub before: Option<Vec<f64>>,
}

impl Redundancy {
    /// Returns (loss, gradient, Gram matrix).
    pub fn run<B: HostBackend>(&self, under: &Under<B>, place: Place) -> (f64, Vec<f64>, Vec<f64>) {
        let Self { h, d, .. } = *self;
        let context = format!("{}: weight_redundancy {h}×{d} {:?} {place:?}", under.name, self.form);
        let weight = Guarded::<ElementOf<B>>::matrix(place, h, d, &self.weight);
        let mut grad = Guarded::<RealOf<B>>::matrix_or_poison(place, h, d, self.before.as_deref());
        let mut loss = Guarded::<f64>::vector_or_poison(place, 1, None);
        let side = if self.form.is_dual(h, d) { d } else { h };
        let mut gram = Guarded::<RealOf<B>>::poisoned(place, side, side);
        let mut scratch = workspace_at(under, place, 0, d, h);
        under
            .backend
            .weight_redundancy(operations::WeightRedundancy {
                weight: weight.mat(),
                normalize: self.normalize,
                form: self.form,
                lambda: self.lambda,
                gram: gram.mat_mut(),
                loss: loss.slice_mut(),
                grad_weight: self.before.is_some().then(|| grad.mat_mut()),
                workspace: scratch.slice_mut(),
            })
            .unwrap_or_else(|e| panic!("{context}: {e}"));
        scratch.checked(&context, "the workspace");
        let grad = keep(self.before.is_some(), grad.checked(&context, "grad_weight"));
        (loss.checked(&context, "loss")[0], grad, gram.checked(&context, "gram"))
    }
}

#[derive(Debug, Clone)]
pub struct Decode {
    pub n: usize,
    pub d: usize,
    pub h: usize,
    pub activations: Vec<f64>,
    /// [H,D].
    pub weight: Vec<f64>,
    pub bias: Vec<f64>,
    pub x: Vec<f64>,
    pub residual_weight: f64,
    /// Squared error to add to.
    pub before: Option<f64>,
    /// Whether reconstruction and residual are wanted.
    pub wanted: [bool; 2],
}

#[derive(Debug, Clone, PartialEq)]
pub struct Decoded {
    pub reconstruction: Vec<f64>,
    pub residual: Vec<f64>,
    pub squared_error: Vec<f64>,
}

impl Decode {
    pub fn run<B: HostBackend>(&self, under: &Under<B>, place: Place) -> Decoded {
        let Self { n, d, h, .. } = *self;
        let context = format!("{}: decode {n}×{d}×{h} {place:?}", under.name);
        let activations = Guarded::<ElementOf<B>>::matrix(place, n, h, &self.activations);
        let weight = Guarded::<ElementOf<B>>::matrix(place, h, d, &self.weight);
        let bias = Guarded::<RealOf<B>>::vector(place, &self.bias);
        let x = Guarded::<ElementOf<B>>::matrix(place, n, d, &self.x);
        let mut reconstruction = Guarded::<RealOf<B>>::poisoned(place, n, d);
        let mut residual = Guarded::<ElementOf<B>>::poisoned(place, n, d);
        let before = self.before.map(|b| [b]);
        let mut squared_error = Guarded::<f64>::vector_or_poison(place, 1, before.as_ref().map(|b| b.as_slice()));
        let mut scratch = workspace_at(under, place, n, d, h);
        under
            .backend
            .decode(operations::Decode {
                activations: activations.mat(),
                weight: weight.mat(),
                bias: bias.slice(),
                x: x.mat(),
                reconstruction: self.wanted[0].then(|| reconstruction.mat_mut()),
                residual_weight: self.residual_weight,
                residual: self.wanted[1].then(|| residual.mat_mut()),
                accumulate: self.before.is_some(),
                squared_error: squared_error.slice_mut(),
                workspace: scratch.slice_mut(),
            })
            .unwrap_or_else(|e| panic!("{context}: {e}"));
        scratch.checked(&context, "the workspace");
        Decoded {
            reconstruction: keep(self.wanted[0], reconstruction.checked(&context, "reconstruction")),
            residual: keep(self.wanted[1], residual.checked(&context, "residual")),
            squared_error: squared_error.checked(&context, "squared_error"),
        }
    }
}

#[derive(Debug, Clone)]
pub struct DecodeBackward {
    pub n: usize,
    pub d: usize,
    pub h: usize,
    pub residual: Vec<f64>,
    /// [H,D].
    pub weight: Vec<f64>,
    pub activations: Vec<f64>,
    pub activation: Activation,
    pub l1: f64,
    /// Bias gradient to add to.
    pub before: Option<Vec<f64>>,
}

impl DecodeBackward {
    /// Returns (dz, grad_bias).
    pub fn run<B: HostBackend>(&self, under: &Under<B>, place: Place) -> (Vec<f64>, Vec<f64>) {
        let Self { n, d, h, .. } = *self;
        let context = format!("{}: decode_backward {n}×{d}×{h} {:?} {place:?}", under.name, self.activation);
        let residual = Guarded::<ElementOf<B>>::matrix(place, n, d, &self.residual);
        let weight = Guarded::<ElementOf<B>>::matrix(place, h, d, &self.weight);
        let activations = Guarded::<ElementOf<B>>::matrix(place, n, h, &self.activations);
        let mut dz = Guarded::<ElementOf<B>>::poisoned(place, n, h);
        let mut grad_bias = Guarded::<RealOf<B>>::vector_or_poison(place, h, self.before.as_deref());
        let mut scratch = workspace_at(under, place, n, d, h);
        under
            .backend
            .decode_backward(operations::DecodeBackward {
                residual: residual.mat(),
                weight: weight.mat(),
                activations: activations.mat(),
                activation: self.activation,
                l1: self.l1,
                dz: dz.mat_mut(),
                accumulate: self.before.is_some(),
                grad_bias: grad_bias.slice_mut(),
                workspace: scratch.slice_mut(),
            })
            .unwrap_or_else(|e| panic!("{context}: {e}"));
        scratch.checked(&context, "the workspace");
        (dz.checked(&context, "dz"), grad_bias.checked(&context, "grad_bias"))
    }
}
