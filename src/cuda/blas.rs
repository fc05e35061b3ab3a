//! Plain products of 16-bit matrices by cuBLASLt: its library is looked for at run time, and what it needs to know of a product is kept
//! in a plan, so that its heuristic runs once for each kind of product.
//!
//! cuBLASLt is column-major. A row-major matrix is its own transpose there, so left·right is asked for as outᵀ = rightᵀ·leftᵀ: the operands
//! change places, and each keeps the transposition that it had.
//!
//! Not yet run on hardware.

use super::driver::{Place, PlainProduct, Storage};
use crate::error::{Error, Result};
use crate::operations::Layout;
use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use cudarc::driver::CudaContext;
use cudarc::driver::sys::CUstream;
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Mutex, PoisonError};

/// The first version whose interface is today's: descriptors have a compute type and a scale type.
const LEAST_VERSION: usize = 110_000;
/// Plans are thrown away at this number: a caller may have ever new numbers of rows.
const MAX_PLANS: usize = 1024;
/// No algorithm wants more.
const MAX_ALIGNMENT: u32 = 16;

/// The library, opened in a context.
pub(super) struct Blas {
    plans: Mutex<HashMap<Key, Option<Plan>>>,
    handle: Owned<sys::cublasLtHandle_t>,
    workspace_bytes: usize,
}

/// What the choice of an algorithm depends on. β does not count: C is D, and is not read for β = 0.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    layout: Layout,
    storage: Storage,
    extents: [usize; 3],
    /// Of left, right and output.
    row_strides: [usize; 3],
    /// Bytes, of every row's start.
    alignments: [u32; 3],
}

/// Descriptors of a product, and the algorithm for it.
struct Plan {
    product: Owned<sys::cublasLtMatmulDesc_t>,
    left: Owned<sys::cublasLtMatrixLayout_t>,
    right: Owned<sys::cublasLtMatrixLayout_t>,
    out: Owned<sys::cublasLtMatrixLayout_t>,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

/// A handle of the library's that is ours to destroy.
struct Owned<T: Copy> {
    raw: T,
    destroy: unsafe fn(T) -> std::result::Result<(), CublasError>,
}

impl<T: Copy> Drop for Owned<T> {
    fn drop(&mut self) {
        // SAFETY: made by the library, and destroyed once. An error has nowhere to go.
        let _ = unsafe { (self.destroy)(self.raw) };
    }
}

fn failed(call: &'static str) -> impl Fn(CublasError) -> Error {
    move |error| Error::Device { call, reason: format!("cuBLASLt: {error}") }
}

/// Loads the library before cudarc does, which panics where there is none. It stays loaded.
fn is_there() -> bool {
    // SAFETY: the library is made to be loaded like this.
    let load = |name: String| unsafe { libloading::Library::new(name) }.ok();
    // cudarc tries the same names in the same order.
    cudarc::get_lib_name_candidates("cublasLt").into_iter().find_map(load).map(std::mem::forget).is_some()
}

impl Blas {
    /// The library, if it is there and can be used. The context is the current one.
    pub(super) fn open(context: &CudaContext) -> Option<Self> {
        // SAFETY: the library is loaded; the function takes nothing.
        if !is_there() || unsafe { sys::cublasLtGetVersion() } < LEAST_VERSION {
            return None;
        }
        // It fails where the library is too new for the driver: then it is of no use to us.
        let handle = Owned { raw: result::create_handle().ok()?, destroy: result::destroy_handle };
        // What NVIDIA's own library of products, cuBLAS, takes on these GPUs.
        let is_hopper = context.compute_capability().is_ok_and(|(major, _)| major >= 9);
        let workspace_bytes = if is_hopper { 32 << 20 } else { 4 << 20 };
        Some(Self { plans: Mutex::default(), handle, workspace_bytes })
    }

    pub(super) fn workspace_bytes(&self) -> usize {
        self.workspace_bytes
    }

    /// Enqueues a product; false if the library has no algorithm for it.
    ///
    /// # Safety
    /// As [`Driver::product`](super::driver::Driver::product); the stream is of the context that the library was opened in, which is the
    /// current one.
    pub(super) unsafe fn product(&self, product: &PlainProduct, stream: CUstream) -> Result<bool> {
        let key = Key::of(product);
        // A plan is whole or not there, so a panic elsewhere does no harm.
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if !plans.contains_key(&key) {
            if plans.len() >= MAX_PLANS {
                plans.clear();
            }
            let plan = self.plan(&key, product.shapes())?;
            plans.insert(key, plan);
        }
        let Some(Some(plan)) = plans.get(&key) else { return Ok(false) };
        let (alpha, beta) = (1.0f32, if product.accumulate { 1.0f32 } else { 0.0 });
        let out = product.out.address as *mut c_void;
        // SAFETY: the caller's promise; the descriptors are the plan's, which the lock keeps; α and β are read before this returns.
        unsafe {
            result::matmul(
                self.handle.raw,
                plan.product.raw,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                product.right.address as *const c_void,
                plan.right.raw,
                product.left.address as *const c_void,
                plan.left.raw,
                out,
                plan.out.raw,
                out,
                plan.out.raw,
                &plan.algorithm,
                product.workspace as *mut c_void,
                self.workspace_bytes,
                stream.cast(),
            )
        }
        .map_err(failed("cublasLtMatmul"))?;
        Ok(true)
    }

    /// The plan of a product whose left, right and output have these rows and columns; none if the library has no algorithm for it.
    fn plan(&self, key: &Key, shapes: [[usize; 2]; 3]) -> Result<Option<Plan>> {
        let input = match key.storage {
            Storage::Bf16 => sys::cudaDataType::CUDA_R_16BF,
            Storage::F16 => sys::cudaDataType::CUDA_R_16F,
        };
        let matrix = |at: usize, scalar: sys::cudaDataType| -> Result<Owned<_>> {
            let [rows, cols] = shapes[at];
            let raw = result::create_matrix_layout(scalar, cols as u64, rows as u64, key.row_strides[at] as i64)
                .map_err(failed("cublasLtMatrixLayoutCreate"))?;
            Ok(Owned { raw, destroy: result::destroy_matrix_layout })
        };
        let (left, right) = (matrix(0, input)?, matrix(1, input)?);
        let out = matrix(2, sys::cudaDataType::CUDA_R_32F)?;

        let raw =
            result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType::CUDA_R_32F)
                .map_err(failed("cublasLtMatmulDescCreate"))?;
        let product = Owned { raw, destroy: result::destroy_matmul_desc };
        // A is right, B is left.
        for (attribute, is_transposed) in [
            (sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA, key.layout == Layout::Nt),
            (sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSB, key.layout == Layout::Tn),
        ] {
            let operation = i32::from(is_transposed);
            // SAFETY: the descriptor lives, and the attribute is of this type.
            unsafe {
                result::set_matmul_desc_attribute(
                    product.raw,
                    attribute,
                    (&raw const operation).cast(),
                    size_of::<i32>(),
                )
            }
            .map_err(failed("cublasLtMatmulDescSetAttribute"))?;
        }

        let raw = result::create_matmul_pref().map_err(failed("cublasLtMatmulPreferenceCreate"))?;
        let preference = Owned { raw, destroy: result::destroy_matmul_pref };
        let set = |attribute, value: *const c_void, bytes: usize| {
            // SAFETY: the preference lives; each attribute below is given a value of its type.
            unsafe { result::set_matmul_pref_attribute(preference.raw, attribute, value, bytes) }
                .map_err(failed("cublasLtMatmulPreferenceSetAttribute"))
        };
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let bytes = self.workspace_bytes as u64;
        set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (&raw const bytes).cast(), size_of::<u64>())?;
        // Partial sums of a split depth are stored apart and added in order, in f32: the same bits each time.
        let schemes = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_NONE as u32
            | sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        set(Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, (&raw const schemes).cast(), size_of::<u32>())?;
        let [left_alignment, right_alignment, out_alignment] = key.alignments;
        for (attribute, alignment) in [
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, right_alignment),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, left_alignment),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, out_alignment),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, out_alignment),
        ] {
            set(attribute, (&raw const alignment).cast(), size_of::<u32>())?;
        }

        // SAFETY: all of them live.
        let found = unsafe {
            result::get_matmul_algo_heuristic(
                self.handle.raw,
                product.raw,
                right.raw,
                left.raw,
                out.raw,
                out.raw,
                preference.raw,
            )
        };
        match found {
            Ok(found) => Ok(Some(Plan { product, left, right, out, algorithm: found.algo })),
            Err(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)) => Ok(None),
            Err(error) => Err(failed("cublasLtMatmulAlgoGetHeuristic")(error)),
        }
    }
}

impl Key {
    fn of(product: &PlainProduct) -> Self {
        let PlainProduct { layout, storage, extents, left, right, out, .. } = *product;
        let alignment = |place: Place, element: u64| {
            let starts = place.address | place.row_stride as u64 * element;
            1 << starts.trailing_zeros().min(MAX_ALIGNMENT.trailing_zeros())
        };
        Self {
            layout,
            storage,
            extents,
            row_strides: [left, right, out].map(|place| place.row_stride),
            alignments: [alignment(left, 2), alignment(right, 2), alignment(out, 4)],
        }
    }
}
