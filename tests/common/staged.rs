//! The CUDA backend as one whose memory is the host's: every operand is copied to the device before a call and back after it, gaps
//! between rows and unaligned starts included, so that the tests of the other backends run on it as they are.

use sae_kernels::operations::*;
use sae_kernels::{
    Backend, Cuda, CudaBuffer, CudaElement, CudaMemory, CudaRef, CudaRefMut, Element, Host, MatMut, MatRef, Memory,
    Result, Shape, Trained,
};

/// A backend on a device, with the host's memory.
pub struct Staged<E: CudaElement>(pub Cuda<E>);

/// A slice's copy on the device.
struct Copied<T> {
    buffer: CudaBuffer<T>,
    skip: usize,
    len: usize,
}

impl<T: Element> Copied<T> {
    fn slice(&self) -> CudaRef<'_, T> {
        CudaMemory::part(CudaMemory::slice(&self.buffer), self.skip..self.skip + self.len)
    }
    fn slice_mut(&mut self) -> CudaRefMut<'_, T> {
        CudaMemory::part_mut(CudaMemory::slice_mut(&mut self.buffer), self.skip..self.skip + self.len)
    }
    fn mat(&self, like: &MatRef<'_, T>) -> MatRef<'_, T, CudaMemory> {
        MatRef::from_memory(self.slice(), like.rows(), like.cols(), like.row_stride()).unwrap()
    }
    fn mat_mut(&mut self, extent: [usize; 3]) -> MatMut<'_, T, CudaMemory> {
        MatMut::from_memory(self.slice_mut(), extent[0], extent[1], extent[2]).unwrap()
    }
}

fn extent<T: Element>(matrix: &MatMut<'_, T>) -> [usize; 3] {
    [matrix.rows(), matrix.cols(), matrix.row_stride()]
}

impl<E: CudaElement> Staged<E> {
    /// A copy that starts as far from a multiple of 16 bytes as the slice does.
    fn copy<T: Element>(&self, host: &[T]) -> Result<Copied<T>> {
        let (skip, len) = (host.as_ptr() as usize % 16 / size_of::<T>(), host.len());
        let mut copied = Copied { buffer: self.0.alloc(skip + len)?, skip, len };
        self.0.upload(host, copied.slice_mut())?;
        Ok(copied)
    }
    fn back<T: Element>(&self, copied: &Copied<T>, host: &mut [T]) -> Result<()> {
        self.0.download(copied.slice(), host)
    }
    fn copy_mat<T: Element>(&self, matrix: &mut Option<MatMut<'_, T>>) -> Result<Option<Copied<T>>> {
        matrix.as_mut().map(|matrix| self.copy(matrix.data_mut())).transpose()
    }
    fn mat_back<T: Element>(&self, copied: &Option<Copied<T>>, matrix: &mut Option<MatMut<'_, T>>) -> Result<()> {
        match (copied, matrix) {
            (Some(copied), Some(matrix)) => self.back(copied, matrix.data_mut()),
            _ => Ok(()),
        }
    }
    fn copy_slice<T: Element>(&self, slice: &Option<&mut [T]>) -> Result<Option<Copied<T>>> {
        slice.as_ref().map(|slice| self.copy(slice)).transpose()
    }
    fn slice_back<T: Element>(&self, copied: &Option<Copied<T>>, slice: &mut Option<&mut [T]>) -> Result<()> {
        match (copied, slice) {
            (Some(copied), Some(slice)) => self.back(copied, slice),
            _ => Ok(()),
        }
    }
    fn copy_moments(&self, moments: &Option<Moments<'_, Self>>) -> Result<Option<CopiedMoments>> {
        let copy = |m: &Moments<'_, Self>| {
            Ok(CopiedMoments {
                shift: m.shift.map(|shift| self.copy(shift)).transpose()?,
                accumulate: m.accumulate,
                sums: [self.copy(m.row_loss_sum)?, self.copy(m.sum)?, self.copy(m.sum_squares)?],
            })
        };
        moments.as_ref().map(copy).transpose()
    }
    fn copy_trained(&self, trained: &Trained<'_, Self>) -> Result<CopiedTrained<E>> {
        let state: [&[f32]; 2] = match &trained.optimizer {
            Optimizer::Sgd { velocity, .. } => [velocity, &[]],
            Optimizer::Adam { first_moment, second_moment, .. } => [first_moment, second_moment],
        };
        Ok(CopiedTrained {
            parameters: self.copy(trained.parameters)?,
            storage: self.copy_slice(&trained.storage)?,
            state: [self.copy(state[0])?, self.copy(state[1])?],
        })
    }
    fn trained_back(&self, copied: &CopiedTrained<E>, trained: &mut Trained<'_, Self>) -> Result<()> {
        let [first, second] = &copied.state;
        match &mut trained.optimizer {
            Optimizer::Sgd { velocity, .. } => self.back(first, velocity)?,
            Optimizer::Adam { first_moment, second_moment, .. } => {
                self.back(first, first_moment)?;
                self.back(second, second_moment)?;
            }
        }
        self.back(&copied.parameters, trained.parameters)?;
        self.slice_back(&copied.storage, &mut trained.storage)
    }
    fn moments_back(&self, copied: &Option<CopiedMoments>, moments: Option<Moments<'_, Self>>) -> Result<()> {
        if let (Some(CopiedMoments { sums: [row_loss_sum, sum, sum_squares], .. }), Some(m)) = (copied, moments) {
            self.back(row_loss_sum, m.row_loss_sum)?;
            self.back(sum, m.sum)?;
            self.back(sum_squares, m.sum_squares)?;
        }
        Ok(())
    }
}

/// Moments on the device: Σℓ, Σ(a − c), Σ(a − c)².
struct CopiedMoments {
    shift: Option<Copied<f32>>,
    accumulate: bool,
    sums: [Copied<f64>; 3],
}

impl CopiedMoments {
    fn moments<E: CudaElement>(&mut self) -> Moments<'_, Cuda<E>> {
        let [row_loss_sum, sum, sum_squares] = &mut self.sums;
        Moments {
            shift: self.shift.as_ref().map(Copied::slice),
            accumulate: self.accumulate,
            row_loss_sum: row_loss_sum.slice_mut(),
            sum: sum.slice_mut(),
            sum_squares: sum_squares.slice_mut(),
        }
    }
}

/// Parameters in training on the device.
struct CopiedTrained<E> {
    parameters: Copied<f32>,
    storage: Option<Copied<E>>,
    state: [Copied<f32>; 2],
}

impl<E: CudaElement> CopiedTrained<E> {
    fn trained(&mut self, like: &Trained<'_, Staged<E>>) -> Trained<'_, Cuda<E>> {
        let [first, second] = &mut self.state;
        Trained {
            parameters: self.parameters.slice_mut(),
            storage: self.storage.as_mut().map(Copied::slice_mut),
            optimizer: match like.optimizer {
                Optimizer::Sgd { config, .. } => Optimizer::Sgd { config, velocity: first.slice_mut() },
                Optimizer::Adam { config, step, .. } => {
                    Optimizer::Adam { config, step, first_moment: first.slice_mut(), second_moment: second.slice_mut() }
                }
            },
        }
    }
}

/// Parameters of a fused step on the device: W and b, and their gradients if wanted; or in training.
enum CopiedParameters<E> {
    Fixed(Copied<E>, Copied<f32>, Option<[Copied<f32>; 2]>),
    Trained(CopiedTrained<E>, CopiedTrained<E>),
}

impl<E: CudaElement> Backend for Staged<E> {
    type Memory = Host;
    type Element = E;
    type Real = f32;

    fn alloc<T: Element>(&self, len: usize) -> Result<Vec<T>> {
        sae_kernels::Reference.alloc(len)
    }
    fn upload<T: Element>(&self, source: &[T], target: &mut [T]) -> Result<()> {
        sae_kernels::Reference.upload(source, target)
    }
    fn download<T: Element>(&self, source: &[T], target: &mut [T]) -> Result<()> {
        sae_kernels::Reference.upload(source, target)
    }
    fn workspace_len_of(&self, operation: Operation, shape: Shape) -> Result<usize> {
        self.0.workspace_len_of(operation, shape)
    }

    fn encode(&self, mut args: Encode<'_, Self>) -> Result<()> {
        args.check()?;
        let (x, weight, bias) = (self.copy(args.x.data())?, self.copy(args.weight.data())?, self.copy(args.bias)?);
        let mut workspace = self.copy(args.workspace)?;
        let mut activations = self.copy_mat(&mut args.activations)?;
        let mut row_loss = self.copy_slice(&args.row_loss)?;
        let mut moments = self.copy_moments(&args.moments)?;
        self.0.encode(Encode {
            x: x.mat(&args.x),
            weight: weight.mat(&args.weight),
            bias: bias.slice(),
            activation: args.activation,
            activations: activations.as_mut().zip(args.activations.as_ref()).map(|(a, like)| a.mat_mut(extent(like))),
            row_loss: row_loss.as_mut().map(Copied::slice_mut),
            moments: moments.as_mut().map(CopiedMoments::moments),
            workspace: workspace.slice_mut(),
        })?;
        self.mat_back(&activations, &mut args.activations)?;
        self.slice_back(&row_loss, &mut args.row_loss)?;
        self.moments_back(&moments, args.moments)
    }

    fn activation_sums(&self, mut args: ActivationSums<'_, Self>) -> Result<()> {
        args.check()?;
        let (activations, mut workspace) = (self.copy(args.activations.data())?, self.copy(args.workspace)?);
        let mut row_loss = self.copy_slice(&args.row_loss)?;
        let mut moments = self.copy_moments(&args.moments)?;
        self.0.activation_sums(ActivationSums {
            activations: activations.mat(&args.activations),
            row_loss: row_loss.as_mut().map(Copied::slice_mut),
            moments: moments.as_mut().map(CopiedMoments::moments),
            workspace: workspace.slice_mut(),
        })?;
        self.slice_back(&row_loss, &mut args.row_loss)?;
        self.moments_back(&moments, args.moments)
    }

    fn responsibilities(&self, mut args: Responsibilities<'_, Self>) -> Result<()> {
        args.check()?;
        let (activations, row_loss) = (self.copy(args.activations.data())?, self.copy(args.row_loss)?);
        let mut out = self.copy(args.responsibilities.data_mut())?;
        self.0.responsibilities(Responsibilities {
            activations: activations.mat(&args.activations),
            row_loss: row_loss.slice(),
            responsibilities: out.mat_mut(extent(&args.responsibilities)),
        })?;
        self.back(&out, args.responsibilities.data_mut())
    }

    fn recentre(&self, args: Recentre<'_, Self>) -> Result<()> {
        args.check()?;
        let activations = self.copy(args.activations.data())?;
        let (mut shift, mut sum) = (self.copy(args.shift)?, self.copy(args.sum)?);
        let mut sum_squares = self.copy(args.sum_squares)?;
        self.0.recentre(Recentre {
            activations: activations.mat(&args.activations),
            shift: shift.slice_mut(),
            sum: sum.slice_mut(),
            sum_squares: sum_squares.slice_mut(),
        })?;
        self.back(&shift, args.shift)?;
        self.back(&sum, args.sum)?;
        self.back(&sum_squares, args.sum_squares)
    }

    fn comoments(&self, mut args: Comoments<'_, Self>) -> Result<()> {
        args.check()?;
        let (activations, shift) = (self.copy(args.activations.data())?, self.copy(args.shift)?);
        let (mut comoments, mut workspace) = (self.copy(args.comoments.data_mut())?, self.copy(args.workspace)?);
        self.0.comoments(Comoments {
            activations: activations.mat(&args.activations),
            shift: shift.slice(),
            accumulate: args.accumulate,
            comoments: comoments.mat_mut(extent(&args.comoments)),
            workspace: workspace.slice_mut(),
        })?;
        self.back(&comoments, args.comoments.data_mut())
    }

    fn pack_statistics(&self, args: PackStatistics<'_, Self>) -> Result<()> {
        args.check()?;
        let (row_loss_sum, shift) = (self.copy(args.row_loss_sum)?, self.copy(args.shift)?);
        let (sum, sum_squares) = (self.copy(args.sum)?, self.copy(args.sum_squares)?);
        let comoments = args.comoments.map(|comoments| self.copy(comoments.data())).transpose()?;
        let packed_shift = args.packed_shift.map(|shift| self.copy(shift)).transpose()?;
        let mut packed = self.copy(args.packed)?;
        self.0.pack_statistics(PackStatistics {
            count: args.count,
            row_loss_sum: row_loss_sum.slice(),
            shift: shift.slice(),
            sum: sum.slice(),
            sum_squares: sum_squares.slice(),
            comoments: comoments.as_ref().zip(args.comoments.as_ref()).map(|(copy, like)| copy.mat(like)),
            packed_shift: packed_shift.as_ref().map(Copied::slice),
            accumulate: args.accumulate,
            packed: packed.slice_mut(),
        })?;
        self.back(&packed, args.packed)
    }

    fn unpack_statistics(&self, mut args: UnpackStatistics<'_, Self>) -> Result<()> {
        args.check()?;
        let packed = self.copy(args.packed)?;
        let packed_shift = args.packed_shift.map(|shift| self.copy(shift)).transpose()?;
        let (mut row_loss_sum, mut shift) = (self.copy(args.row_loss_sum)?, self.copy(args.shift)?);
        let (mut sum, mut sum_squares) = (self.copy(args.sum)?, self.copy(args.sum_squares)?);
        let mut comoments = self.copy_mat(&mut args.comoments)?;
        self.0.unpack_statistics(UnpackStatistics {
            packed: packed.slice(),
            packed_shift: packed_shift.as_ref().map(Copied::slice),
            row_loss_sum: row_loss_sum.slice_mut(),
            shift: shift.slice_mut(),
            sum: sum.slice_mut(),
            sum_squares: sum_squares.slice_mut(),
            comoments: comoments.as_mut().zip(args.comoments.as_ref()).map(|(copy, like)| copy.mat_mut(extent(like))),
        })?;
        self.back(&row_loss_sum, args.row_loss_sum)?;
        self.back(&shift, args.shift)?;
        self.back(&sum, args.sum)?;
        self.back(&sum_squares, args.sum_squares)?;
        self.mat_back(&comoments, &mut args.comoments)
    }

    fn finish_statistics(&self, args: FinishStatistics<'_, Self>) -> Result<()> {
        args.check()?;
        let (shift, sum) = (self.copy(args.shift)?, self.copy(args.sum)?);
        let sum_squares = self.copy(args.sum_squares)?;
        let (mut mean, mut variance) = (self.copy(args.mean)?, self.copy(args.variance)?);
        let (mut scale, mut losses) = (self.copy(args.scale)?, self.copy(args.losses)?);
        let mut workspace = self.copy(args.workspace)?;
        let mut given = args.primal;
        let mut primal = match &mut given {
            Some(p) => Some((
                match &p.covariance {
                    Covariance::InPlace => None,
                    Covariance::Activations(activations) => Some((self.copy(activations.data())?, *activations)),
                },
                (extent(&p.coupling), self.copy(p.coupling.data_mut())?),
                self.copy(p.offset)?,
            )),
            None => None,
        };
        self.0.finish_statistics(FinishStatistics {
            count: args.count,
            objective: args.objective,
            shift: shift.slice(),
            sum: sum.slice(),
            sum_squares: sum_squares.slice(),
            primal: primal.as_mut().map(|(covariance, (extents, coupling), offset)| PrimalCorrelation {
                covariance: match covariance {
                    Some((activations, like)) => Covariance::Activations(activations.mat(like)),
                    None => Covariance::InPlace,
                },
                coupling: coupling.mat_mut(*extents),
                offset: offset.slice_mut(),
            }),
            mean: mean.slice_mut(),
            variance: variance.slice_mut(),
            scale: scale.slice_mut(),
            losses: losses.slice_mut(),
            workspace: workspace.slice_mut(),
        })?;
        if let (Some((_, (_, coupling), offset)), Some(mut p)) = (&primal, given) {
            self.back(coupling, p.coupling.data_mut())?;
            self.back(offset, p.offset)?;
        }
        self.back(&mean, args.mean)?;
        self.back(&variance, args.variance)?;
        self.back(&scale, args.scale)?;
        self.back(&losses, args.losses)
    }

    fn correlation_dual(&self, mut args: CorrelationDual<'_, Self>) -> Result<()> {
        args.check()?;
        let activations = self.copy(args.activations.data())?;
        let (mean, variance) = (self.copy(args.mean)?, self.copy(args.variance)?);
        let (mut gram, mut product) = (self.copy(args.gram.data_mut())?, self.copy(args.product.data_mut())?);
        let (mut scale, mut loss) = (self.copy(args.scale)?, self.copy(args.loss)?);
        let mut workspace = self.copy(args.workspace)?;
        self.0.correlation_dual(CorrelationDual {
            activations: activations.mat(&args.activations),
            mean: mean.slice(),
            variance: variance.slice(),
            lambda_tc: args.lambda_tc,
            gram: gram.mat_mut(extent(&args.gram)),
            product: product.mat_mut(extent(&args.product)),
            scale: scale.slice_mut(),
            loss: loss.slice_mut(),
            workspace: workspace.slice_mut(),
        })?;
        self.back(&gram, args.gram.data_mut())?;
        self.back(&product, args.product.data_mut())?;
        self.back(&scale, args.scale)?;
        self.back(&loss, args.loss)
    }

    fn backward_dz(&self, mut args: BackwardDz<'_, Self>) -> Result<()> {
        args.check()?;
        let (activations, row_loss) = (self.copy(args.activations.data())?, self.copy(args.row_loss)?);
        let (mut dz, mut grad_bias) = (self.copy(args.dz.data_mut())?, self.copy(args.grad_bias)?);
        let mut workspace = self.copy(args.workspace)?;
        let statistics = match &args.statistics {
            Some(s) => {
                let primal = match &s.correlation {
                    CorrelationTerm::Primal { coupling, offset } => {
                        Some((self.copy(coupling.data())?, self.copy(offset)?))
                    }
                    _ => None,
                };
                Some((self.copy(s.mean)?, self.copy(s.scale)?, primal))
            }
            None => None,
        };
        let term = args.statistics.as_ref().zip(statistics.as_ref()).map(|(given, (mean, scale, primal))| {
            let correlation = match (&given.correlation, primal) {
                (CorrelationTerm::Primal { coupling: like, .. }, Some((coupling, offset))) => {
                    CorrelationTerm::Primal { coupling: coupling.mat(like), offset: offset.slice() }
                }
                (CorrelationTerm::Dual, _) => CorrelationTerm::Dual,
                _ => CorrelationTerm::None,
            };
            StatisticsTerm { mean: mean.slice(), scale: scale.slice(), correlation }
        });
        self.0.backward_dz(BackwardDz {
            activations: activations.mat(&args.activations),
            activation: args.activation,
            row_loss: row_loss.slice(),
            row_weight: args.row_weight,
            statistics: term,
            dz: dz.mat_mut(extent(&args.dz)),
            accumulate: args.accumulate,
            grad_bias: grad_bias.slice_mut(),
            workspace: workspace.slice_mut(),
        })?;
        self.back(&dz, args.dz.data_mut())?;
        self.back(&grad_bias, args.grad_bias)
    }

    fn product(&self, mut args: Product<'_, Self>) -> Result<()> {
        args.check()?;
        let (left, right) = (self.copy(args.left.data())?, self.copy(args.right.data())?);
        let (mut out, mut workspace) = (self.copy(args.out.data_mut())?, self.copy(args.workspace)?);
        self.0.product(Product {
            layout: args.layout,
            left: left.mat(&args.left),
            right: right.mat(&args.right),
            accumulate: args.accumulate,
            out: out.mat_mut(extent(&args.out)),
            workspace: workspace.slice_mut(),
        })?;
        self.back(&out, args.out.data_mut())
    }

    fn column_sums(&self, args: ColumnSums<'_, Self>) -> Result<()> {
        args.check()?;
        let matrix = self.copy(args.matrix.data())?;
        let (mut sums, mut workspace) = (self.copy(args.sums)?, self.copy(args.workspace)?);
        self.0.column_sums(ColumnSums {
            matrix: matrix.mat(&args.matrix),
            accumulate: args.accumulate,
            sums: sums.slice_mut(),
            workspace: workspace.slice_mut(),
        })?;
        self.back(&sums, args.sums)
    }

    fn weight_redundancy(&self, mut args: WeightRedundancy<'_, Self>) -> Result<()> {
        args.check()?;
        let weight = self.copy(args.weight.data())?;
        let (mut loss, mut gram) = (self.copy(args.loss)?, self.copy(args.gram.data_mut())?);
        let mut grad = self.copy_mat(&mut args.grad_weight)?;
        let mut workspace = self.copy(args.workspace)?;
        self.0.weight_redundancy(WeightRedundancy {
            weight: weight.mat(&args.weight),
            normalize: args.normalize,
            form: args.form,
            lambda: args.lambda,
            loss: loss.slice_mut(),
            grad_weight: grad.as_mut().zip(args.grad_weight.as_ref()).map(|(grad, like)| grad.mat_mut(extent(like))),
            gram: gram.mat_mut(extent(&args.gram)),
            workspace: workspace.slice_mut(),
        })?;
        self.back(&loss, args.loss)?;
        self.back(&gram, args.gram.data_mut())?;
        self.mat_back(&grad, &mut args.grad_weight)
    }

    fn decode(&self, mut args: Decode<'_, Self>) -> Result<()> {
        args.check()?;
        let (activations, weight) = (self.copy(args.activations.data())?, self.copy(args.weight.data())?);
        let (bias, x) = (self.copy(args.bias)?, self.copy(args.x.data())?);
        let mut reconstruction = self.copy_mat(&mut args.reconstruction)?;
        let mut residual = self.copy_mat(&mut args.residual)?;
        let (mut squared_error, mut workspace) = (self.copy(args.squared_error)?, self.copy(args.workspace)?);
        self.0.decode(Decode {
            activations: activations.mat(&args.activations),
            weight: weight.mat(&args.weight),
            bias: bias.slice(),
            x: x.mat(&args.x),
            reconstruction: reconstruction
                .as_mut()
                .zip(args.reconstruction.as_ref())
                .map(|(copied, like)| copied.mat_mut(extent(like))),
            residual_weight: args.residual_weight,
            residual: residual.as_mut().zip(args.residual.as_ref()).map(|(copied, like)| copied.mat_mut(extent(like))),
            accumulate: args.accumulate,
            squared_error: squared_error.slice_mut(),
            workspace: workspace.slice_mut(),
        })?;
        self.mat_back(&reconstruction, &mut args.reconstruction)?;
        self.mat_back(&residual, &mut args.residual)?;
        self.back(&squared_error, args.squared_error)
    }

    fn decode_backward(&self, mut args: DecodeBackward<'_, Self>) -> Result<()> {
        args.check()?;
        let (residual, weight) = (self.copy(args.residual.data())?, self.copy(args.weight.data())?);
        let activations = self.copy(args.activations.data())?;
        let (mut dz, mut grad_bias) = (self.copy(args.dz.data_mut())?, self.copy(args.grad_bias)?);
        let mut workspace = self.copy(args.workspace)?;
        self.0.decode_backward(DecodeBackward {
            residual: residual.mat(&args.residual),
            weight: weight.mat(&args.weight),
            activations: activations.mat(&args.activations),
            activation: args.activation,
            l1: args.l1,
            dz: dz.mat_mut(extent(&args.dz)),
            accumulate: args.accumulate,
            grad_bias: grad_bias.slice_mut(),
            workspace: workspace.slice_mut(),
        })?;
        self.back(&dz, args.dz.data_mut())?;
        self.back(&grad_bias, args.grad_bias)
    }

    fn sgd(&self, mut args: Sgd<'_, Self>) -> Result<()> {
        args.check()?;
        let (gradient, mut velocity) = (self.copy(args.gradient)?, self.copy(args.velocity)?);
        let (mut parameters, mut storage) = (self.copy(args.parameters)?, self.copy_slice(&args.storage)?);
        self.0.sgd(Sgd {
            config: args.config,
            gradient: gradient.slice(),
            velocity: velocity.slice_mut(),
            parameters: parameters.slice_mut(),
            storage: storage.as_mut().map(Copied::slice_mut),
        })?;
        self.back(&velocity, args.velocity)?;
        self.back(&parameters, args.parameters)?;
        self.slice_back(&storage, &mut args.storage)
    }

    fn adam(&self, mut args: Adam<'_, Self>) -> Result<()> {
        args.check()?;
        let gradient = self.copy(args.gradient)?;
        let (mut first, mut second) = (self.copy(args.first_moment)?, self.copy(args.second_moment)?);
        let (mut parameters, mut storage) = (self.copy(args.parameters)?, self.copy_slice(&args.storage)?);
        self.0.adam(Adam {
            config: args.config,
            step: args.step,
            gradient: gradient.slice(),
            first_moment: first.slice_mut(),
            second_moment: second.slice_mut(),
            parameters: parameters.slice_mut(),
            storage: storage.as_mut().map(Copied::slice_mut),
        })?;
        self.back(&first, args.first_moment)?;
        self.back(&second, args.second_moment)?;
        self.back(&parameters, args.parameters)?;
        self.slice_back(&storage, &mut args.storage)
    }
    fn fused_step(&self, mut args: FusedStep<'_, Self>) -> Result<bool> {
        args.check()?;
        let x = self.copy(args.x.data())?;
        let mut copied = match &mut args.parameters {
            FusedParameters::Fixed { weight, bias } => {
                CopiedParameters::Fixed(self.copy(weight.data())?, self.copy(bias)?, None)
            }
            FusedParameters::Gradients { weight, bias, grad_weight, grad_bias } => {
                let gradients = [self.copy(grad_weight.data_mut())?, self.copy(grad_bias)?];
                CopiedParameters::Fixed(self.copy(weight.data())?, self.copy(bias)?, Some(gradients))
            }
            FusedParameters::Trained { weight, bias } => {
                CopiedParameters::Trained(self.copy_trained(weight)?, self.copy_trained(bias)?)
            }
        };
        let mut activations = self.copy_mat(&mut args.activations)?;
        let mut dz = self.copy_mat(&mut args.dz)?;
        let (mut row_loss, mut row_loss_sum) = (self.copy(args.row_loss)?, self.copy(args.row_loss_sum)?);
        let (mut losses, mut state) = (self.copy(args.losses)?, self.copy(args.state)?);
        let mut workspace = self.copy(args.workspace)?;
        let parameters = match (&args.parameters, &mut copied) {
            (FusedParameters::Fixed { weight, .. }, CopiedParameters::Fixed(w, b, _)) => {
                FusedParameters::Fixed { weight: w.mat(weight), bias: b.slice() }
            }
            (FusedParameters::Gradients { weight, grad_weight, .. }, CopiedParameters::Fixed(w, b, Some([dw, db]))) => {
                FusedParameters::Gradients {
                    weight: w.mat(weight),
                    bias: b.slice(),
                    grad_weight: dw.mat_mut(extent(grad_weight)),
                    grad_bias: db.slice_mut(),
                }
            }
            (FusedParameters::Trained { weight, bias }, CopiedParameters::Trained(w, b)) => {
                FusedParameters::Trained { weight: w.trained(weight), bias: b.trained(bias) }
            }
            _ => unreachable!("copied from the same"),
        };
        let is_fused = self.0.fused_step(FusedStep {
            x: x.mat(&args.x),
            parameters,
            activation: args.activation,
            objective: args.objective,
            activations: activations.as_mut().zip(args.activations.as_ref()).map(|(a, like)| a.mat_mut(extent(like))),
            row_loss: row_loss.slice_mut(),
            dz: dz.as_mut().zip(args.dz.as_ref()).map(|(dz, like)| dz.mat_mut(extent(like))),
            row_loss_sum: row_loss_sum.slice_mut(),
            losses: losses.slice_mut(),
            state: state.slice_mut(),
            workspace: workspace.slice_mut(),
        })?;
        match (&mut args.parameters, &copied) {
            (
                FusedParameters::Gradients { grad_weight, grad_bias, .. },
                CopiedParameters::Fixed(_, _, Some([dw, db])),
            ) => {
                self.back(dw, grad_weight.data_mut())?;
                self.back(db, grad_bias)?;
            }
            (FusedParameters::Trained { weight, bias }, CopiedParameters::Trained(w, b)) => {
                self.trained_back(w, weight)?;
                self.trained_back(b, bias)?;
            }
            _ => {}
        }
        self.mat_back(&activations, &mut args.activations)?;
        self.mat_back(&dz, &mut args.dz)?;
        self.back(&row_loss, args.row_loss)?;
        self.back(&row_loss_sum, args.row_loss_sum)?;
        self.back(&losses, args.losses)?;
        self.back(&state, args.state)?;
        Ok(is_fused)
    }
}
