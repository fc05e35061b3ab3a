//! Candle's graph: tensors whose values the kernels have computed already, and the way of gradients through them.
//!
//! A custom operation of candle has one result, and computes it when it is applied. One call of the kernels has several (losses, activations, all
//! gradients). So the kernels run first, and the operation only hands its part of what they left over to candle.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Error, Layout, Result, Shape, Storage, Tensor};
use std::sync::{LazyLock, Mutex, PoisonError};

/// From arguments, result and the result's gradient to the gradients of those arguments that are tracked.
pub(crate) type Backward<const K: usize> =
    Box<dyn Fn([&Tensor; K], &Tensor, &Tensor) -> Result<[Option<Tensor>; K]> + Send + Sync>;

/// An operation of K arguments whose result is there already.
struct Node<const K: usize> {
    name: &'static str,
    /// Taken when the operation is applied, which is once.
    result: Mutex<Option<(Storage, Shape)>>,
    backward: Backward<K>,
}

impl<const K: usize> Node<K> {
    fn new(name: &'static str, result: Storage, shape: Shape, backward: Backward<K>) -> Self {
        Self { name, result: Mutex::new(Some((result, shape))), backward }
    }

    fn take(&self) -> Result<(Storage, Shape)> {
        let result = self.result.lock().unwrap_or_else(PoisonError::into_inner).take();
        result.ok_or_else(|| Error::msg(format!("{} is applied a second time", self.name)))
    }

    fn take_from_cpu(&self) -> Result<(CpuStorage, Shape)> {
        match self.take()? {
            (Storage::Cpu(result), shape) => Ok((result, shape)),
            (other, _) => Err(self.elsewhere(&other)),
        }
    }

    #[cfg(feature = "cuda")]
    fn take_from_cuda(&self) -> Result<(CudaStorage, Shape)> {
        match self.take()? {
            (Storage::Cuda(result), shape) => Ok((result, shape)),
            (other, _) => Err(self.elsewhere(&other)),
        }
    }

    fn elsewhere(&self, result: &Storage) -> Error {
        Error::msg(format!("{} has its result on {:?}, not with its arguments", self.name, result.device().location()))
    }
}

impl CustomOp1 for Node<1> {
    fn name(&self) -> &'static str {
        self.name
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.take_from_cpu()
    }
    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.take_from_cuda()
    }
    fn bwd(&self, argument: &Tensor, result: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let [gradient] = (self.backward)([argument], result, grad)?;
        Ok(gradient)
    }
}

impl CustomOp2 for Node<2> {
    fn name(&self) -> &'static str {
        self.name
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.take_from_cpu()
    }
    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.take_from_cuda()
    }
    fn bwd(&self, a: &Tensor, b: &Tensor, result: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((self.backward)([a, b], result, grad)?.into())
    }
}

impl CustomOp3 for Node<3> {
    fn name(&self) -> &'static str {
        self.name
    }
    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.take_from_cpu()
    }
    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.take_from_cuda()
    }
    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        result: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        Ok((self.backward)([a, b, c], result, grad)?.into())
    }
}

/// So many arguments as candle's custom operations have.
pub(crate) trait Arguments<const K: usize> {
    /// A tensor of this value that depends on the arguments.
    fn attach(self, name: &'static str, result: Storage, shape: Shape, backward: Backward<K>) -> Result<Tensor>;
}
impl Arguments<1> for [&Tensor; 1] {
    fn attach(self, name: &'static str, result: Storage, shape: Shape, backward: Backward<1>) -> Result<Tensor> {
        let [a] = self;
        a.apply_op1(Node::new(name, result, shape, backward))
    }
}
impl Arguments<2> for [&Tensor; 2] {
    fn attach(self, name: &'static str, result: Storage, shape: Shape, backward: Backward<2>) -> Result<Tensor> {
        let [a, b] = self;
        a.apply_op2(b, Node::new(name, result, shape, backward))
    }
}
impl Arguments<3> for [&Tensor; 3] {
    fn attach(self, name: &'static str, result: Storage, shape: Shape, backward: Backward<3>) -> Result<Tensor> {
        let [a, b, c] = self;
        a.apply_op3(b, c, Node::new(name, result, shape, backward))
    }
}

/// A scalar of type `dtype` whose gradients are there already: going back only scales them. None is for arguments that are not tracked.
pub(crate) fn loss<'a, const K: usize>(
    name: &'static str,
    arguments: [&'a Tensor; K],
    value: f64,
    dtype: DType,
    gradients: [Option<Tensor>; K],
) -> Result<Tensor>
where
    [&'a Tensor; K]: Arguments<K>,
{
    let backward = move |arguments: [&Tensor; K], _: &Tensor, grad: &Tensor| {
        let scale = grad.to_dtype(DType::F64)?.to_scalar()?;
        let mut scaled = [const { None }; K];
        for ((scaled, gradient), argument) in scaled.iter_mut().zip(&gradients).zip(arguments) {
            if let Some(gradient) = gradient {
                *scaled = Some(self::gradient(argument, &gradient.affine(scale, 0.0)?)?);
            }
        }
        Ok(scaled)
    };
    let value = Tensor::new(value, arguments[0].device())?.to_dtype(dtype)?;
    arguments.attach(name, copied(&value)?, Shape::from(()), Box::new(backward))
}

/// The values of a tensor, row by row, in memory of their own.
pub(crate) fn copied(values: &Tensor) -> Result<Storage> {
    let values = values.force_contiguous()?;
    let (storage, layout) = values.storage_and_layout();
    storage.try_clone(layout)
}

/// Whether candle keeps the graph of gradients, to differentiate them again; read as candle reads it.
static GRADIENTS_HAVE_GRAPHS: LazyLock<bool> =
    LazyLock::new(|| std::env::var("CANDLE_GRAD_DO_NOT_DETACH").is_ok_and(|value| !value.is_empty() && value != "0"));

/// What a backward pass returns for `argument`: these values, rounded to its type.
///
/// The gradient depends on the arguments by kernels alone: to differentiate it again is an error, never a silent 0.
pub(crate) fn gradient(argument: &Tensor, values: &Tensor) -> Result<Tensor> {
    let values = values.detach().to_dtype(argument.dtype())?;
    if !*GRADIENTS_HAVE_GRAPHS {
        return Ok(values);
    }
    let again = |_: [&Tensor; 1], _: &Tensor, _: &Tensor| {
        Err(Error::BackwardNotSupported { op: "a gradient of sae-kernels, which has no second derivatives" })
    };
    [argument].attach("sae-gradient", copied(&values)?, argument.shape().clone(), Box::new(again))
}
