//! Every way in which a call can fail. Each message names what was wrong and what would be right.

/// Error of an operation, a model or a backend.
///
/// Arguments are checked before anything is written: after an error all outputs are as they were.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A matrix does not have the shape that the other arguments ask for.
    #[error("{operand} is {found_rows}×{found_cols}, but the other arguments need {rows}×{cols}")]
    Shape {
        /// Name of the argument.
        operand: &'static str,
        /// Rows it should have.
        rows: usize,
        /// Columns it should have.
        cols: usize,
        /// Rows it has.
        found_rows: usize,
        /// Columns it has.
        found_cols: usize,
    },
    /// A vector does not have the length that the other arguments ask for.
    #[error("{operand} has {found} elements, but the other arguments need {expected}")]
    Length {
        /// Name of the argument.
        operand: &'static str,
        /// Elements it should have.
        expected: usize,
        /// Elements it has.
        found: usize,
    },
    /// Parameters are not of the storage type, and the copy of them that is was not given.
    #[error(
        "parameters are {parameters}, but the products read {storage}: pass `storage`, a copy of them in {storage}"
    )]
    NoStorage {
        /// Name of the storage type.
        storage: &'static str,
        /// Name of the parameters' type.
        parameters: &'static str,
    },
    /// The row stride of a view is smaller than its number of columns, so rows would overlap.
    #[error("row stride {row_stride} is smaller than the {cols} columns of a row; pass a stride of at least {cols}")]
    Stride {
        /// Distance between the starts of two rows, in elements.
        row_stride: usize,
        /// Columns of the view.
        cols: usize,
    },
    /// A slice is too short for the view asked of it.
    #[error("a {rows}×{cols} view with row stride {row_stride} needs {needed} elements, but the slice has {found}")]
    ViewTooShort {
        /// Rows of the view.
        rows: usize,
        /// Columns of the view.
        cols: usize,
        /// Distance between the starts of two rows, in elements.
        row_stride: usize,
        /// Elements that the view spans.
        needed: usize,
        /// Elements of the slice.
        found: usize,
    },
    /// A product of extents does not fit in the address space.
    #[error("{what} does not fit in usize; use smaller extents or a smaller block of rows")]
    Overflow {
        /// What was being computed.
        what: &'static str,
    },
    /// The memory for a buffer is not there.
    #[error("could not allocate {bytes} bytes; use smaller extents or a smaller block of rows")]
    Allocation {
        /// Size of the buffer.
        bytes: usize,
    },
    /// The whole batch has too few rows for a term that uses the batch's variance.
    #[error(
        "the batch has {rows} row(s), but the variance and correlation terms need at least 2; \
         use more rows or set lambda_var = lambda_tc = 0"
    )]
    TooFewRows {
        /// Rows of the whole batch.
        rows: u64,
    },
    /// There are no latents: the log-sum-exp over none is infinite.
    #[error("the number of latents is 0; it must be at least 1")]
    NoLatents,
    /// More rows were passed than the plan was made for.
    #[error(
        "the batch has {found} rows, but the plan was made for at most {planned}; make a larger plan or set block_rows"
    )]
    TooManyRows {
        /// Rows the plan was made for.
        planned: usize,
        /// Rows passed.
        found: usize,
    },
    /// A number of the configuration is outside its range.
    #[error("{name} = {value}, but it must be {requirement}")]
    Configuration {
        /// Name of the setting.
        name: &'static str,
        /// Its value.
        value: f64,
        /// Its range, in words.
        requirement: &'static str,
    },
    /// The workspace is smaller than the operation needs.
    #[error("the workspace has {found} elements, but this shape needs {needed}; size it with Backend::workspace_len")]
    Workspace {
        /// Elements (of `f64`) needed.
        needed: usize,
        /// Elements passed.
        found: usize,
    },
    /// The dual form needs all rows of the batch at once.
    #[error(
        "the dual form needs the whole batch in one block ({block_rows} rows), but the batch has {rows}; use Form::Auto or a larger block_rows"
    )]
    DualNeedsOneBlock {
        /// Rows of the batch.
        rows: usize,
        /// Rows of a block.
        block_rows: usize,
    },
    /// Statistics of a batch that cannot be: summed wrongly over hosts, or not set to 0 before.
    #[error(
        "statistics[0] = {count}, but it must be the number of rows of the whole batch, at least the {rows} of this call; \
         set the sums to 0 before the first phase, and sum them over all hosts"
    )]
    Count {
        /// What the sums say.
        count: f64,
        /// Rows of the call.
        rows: usize,
    },
    /// Statistics of different kinds or widths cannot be merged or used.
    #[error("statistics of {found} do not fit here, where {expected} are needed")]
    Statistics {
        /// What is needed.
        expected: String,
        /// What was passed.
        found: String,
    },
    /// This processor lacks the instruction set that was asked for.
    #[error("this processor does not have {isa}; use Isa::detect()")]
    IsaUnavailable {
        /// Name of the instruction set.
        isa: &'static str,
    },
    /// The thread pool could not be started.
    #[error("could not start {threads} threads: {reason}")]
    Threads {
        /// Threads asked for.
        threads: usize,
        /// What the operating system or the build said.
        reason: String,
    },
    /// The NVIDIA driver's library is not on this machine.
    #[error("no NVIDIA driver: {reason}; install one, or use the Cpu backend")]
    NoDriver {
        /// What the loader said.
        reason: String,
    },
    /// There is no GPU with this number.
    #[error("there is no CUDA device {ordinal}: the driver shows {found} (CUDA_VISIBLE_DEVICES may hide some)")]
    NoDevice {
        /// Number asked for, from 0.
        ordinal: usize,
        /// Devices that the driver shows.
        found: usize,
    },
    /// The NVIDIA driver is older than the toolkit that the kernels were compiled with.
    #[error(
        "the NVIDIA driver supports CUDA {}.{}, but the kernels were compiled with CUDA {}.{}; update the driver, or build with an older toolkit",
        found / 1000, found % 1000 / 10, needed / 1000, needed % 1000 / 10
    )]
    DriverTooOld {
        /// CUDA version of the driver, as 1000·major + 10·minor.
        found: i32,
        /// CUDA version needed.
        needed: i32,
    },
    /// The crate was built without its CUDA kernels.
    #[error(
        "the CUDA kernels were not built: {reason}; install the CUDA toolkit (scripts/cuda-toolchain.sh does) or set SAE_KERNELS_NVCC, and build again"
    )]
    KernelsNotBuilt {
        /// Why.
        reason: &'static str,
    },
    /// The kernels were not compiled for this GPU.
    #[error(
        "the CUDA kernels hold no image for {device} (compute capability {major}.{minor}); build without SAE_KERNELS_CUDA_ARCHS, or name it there"
    )]
    NoImage {
        /// Name of the GPU.
        device: String,
        /// Its compute capability.
        major: i32,
        /// Its compute capability.
        minor: i32,
    },
    /// A device's memory is used up.
    #[error("the device has no {bytes} bytes of memory left; use a smaller plan or block_rows")]
    DeviceMemory {
        /// Bytes asked for.
        bytes: usize,
    },
    /// A call of a device's driver failed.
    #[error("{call} failed: {reason}")]
    Device {
        /// What was called.
        call: &'static str,
        /// What the driver said.
        reason: String,
    },
}

/// Result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// `expected == found` or [`Error::Length`].
pub(crate) fn check_len(operand: &'static str, expected: usize, found: usize) -> Result<()> {
    if expected == found { Ok(()) } else { Err(Error::Length { operand, expected, found }) }
}
