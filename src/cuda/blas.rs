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
/// Alignments beyond it are not told apart: vector loads and TMA want no more.
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

/// A product, and the algorithm for it.
struct Plan {
    terms: Terms,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

/// Descriptors of a product and of its matrices.
struct Terms {
    product: Owned<sys::cublasLtMatmulDesc_t>,
    left: Owned<sys::cublasLtMatrixLayout_t>,
    right: Owned<sys::cublasLtMatrixLayout_t>,
    out: Owned<sys::cublasLtMatrixLayout_t>,
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
    names().find_map(load).map(std::mem::forget).is_some()
}

/// Names of the library, all of which cudarc tries too. A program that is linked to the library, as cudarc's `dynamic-linking` has it, has loaded
/// it under one of them.
fn names() -> impl Iterator<Item = String> {
    use std::env::consts::{DLL_PREFIX, DLL_SUFFIX};
    let version = |version: u32| {
        if cfg!(windows) {
            format!("cublasLt64_{version}.dll")
        } else {
            format!("{DLL_PREFIX}cublasLt{DLL_SUFFIX}.{version}")
        }
    };
    let of_headers = cudarc::driver::sys::CUDA_VERSION / 1000;
    std::iter::once(format!("{DLL_PREFIX}cublasLt{DLL_SUFFIX}")).chain([of_headers, 12, 11].map(version))
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
                plan.terms.product.raw,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                product.right.address as *const c_void,
                plan.terms.right.raw,
                product.left.address as *const c_void,
                plan.terms.left.raw,
                out,
                plan.terms.out.raw,
                out,
                plan.terms.out.raw,
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
        let terms = Terms::new(key, shapes)?;
        let preference = preference(key, self.workspace_bytes)?;
        // SAFETY: all of them live.
        let found = unsafe {
            result::get_matmul_algo_heuristic(
                self.handle.raw,
                terms.product.raw,
                terms.right.raw,
                terms.left.raw,
                terms.out.raw,
                terms.out.raw,
                preference.raw,
            )
        };
        match found {
            Ok(found) => Ok(Some(Plan { terms, algorithm: found.algo })),
            Err(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)) => Ok(None),
            Err(error) => Err(failed("cublasLtMatmulAlgoGetHeuristic")(error)),
        }
    }
}

impl Terms {
    fn new(key: &Key, shapes: [[usize; 2]; 3]) -> Result<Self> {
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
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        for (attribute, is_transposed) in [
            (Attribute::CUBLASLT_MATMUL_DESC_TRANSA, key.layout == Layout::Nt),
            (Attribute::CUBLASLT_MATMUL_DESC_TRANSB, key.layout == Layout::Tn),
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
        Ok(Self { product, left, right, out })
    }
}

/// Which algorithms may be chosen.
fn preference(key: &Key, workspace_bytes: usize) -> Result<Owned<sys::cublasLtMatmulPreference_t>> {
    let raw = result::create_matmul_pref().map_err(failed("cublasLtMatmulPreferenceCreate"))?;
    let preference = Owned { raw, destroy: result::destroy_matmul_pref };
    let set = |attribute, value: *const c_void, bytes: usize| {
        // SAFETY: the preference lives; each attribute below is given a value of its type.
        unsafe { result::set_matmul_pref_attribute(preference.raw, attribute, value, bytes) }
            .map_err(failed("cublasLtMatmulPreferenceSetAttribute"))
    };
    use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
    let bytes = workspace_bytes as u64;
    set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (&raw const bytes).cast(), size_of::<u64>())?;
    // Partial sums of a split depth are stored apart and added in order, in f32: the same bits each time.
    let schemes = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_NONE as u32
        | sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
    set(Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, (&raw const schemes).cast(), size_of::<u32>())?;
    let [left, right, out] = key.alignments;
    for (attribute, alignment) in [
        (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, right),
        (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, left),
        (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, out),
        (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, out),
    ] {
        set(attribute, (&raw const alignment).cast(), size_of::<u32>())?;
    }
    Ok(preference)
}

impl Key {
    fn of(product: &PlainProduct) -> Self {
        let PlainProduct { layout, storage, extents, left, right, out, .. } = *product;
        let alignment = |place: Place, element: u64| {
            let starts = place.address | (place.row_stride as u64 * element);
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

#[cfg(test)]
mod tests {
    use super::*;

    fn product(layout: Layout, address: u64, row_strides: [usize; 3]) -> PlainProduct {
        let [left, right, out] = row_strides.map(|row_stride| Place { address, row_stride });
        let extents = [5, 7, 9];
        PlainProduct { layout, storage: Storage::Bf16, extents, left, right, out, accumulate: false, workspace: 0 }
    }

    #[test]
    fn alignment_is_of_every_row() {
        let alignments = |address, stride| Key::of(&product(Layout::Nn, address, [stride; 3])).alignments;
        assert_eq!(alignments(256, 64), [16, 16, 16]);
        assert_eq!(alignments(256, 12), [8, 8, 16]);
        assert_eq!(alignments(256, 11), [2, 2, 4]);
        assert_eq!(alignments(4, 64), [4, 4, 4]);
    }

    /// An attribute of a descriptor.
    macro_rules! attribute {
        ($get:ident, $from:expr, $attribute:expr, $type:ty) => {{
            let (mut value, mut written) = <($type, usize)>::default();
            let to = (&raw mut value).cast();
            // SAFETY: the descriptor lives, and the attribute has the size of the value.
            unsafe { sys::$get($from.raw, $attribute, to, size_of::<$type>(), &mut written) }.result().unwrap();
            assert_eq!(written, size_of::<$type>());
            value
        }};
    }

    /// A matrix as the library was told that it lies.
    struct Told {
        rows: usize,
        cols: usize,
        stride: usize,
        is_transposed: bool,
    }

    impl Told {
        fn new(layout: &Owned<sys::cublasLtMatrixLayout_t>, is_transposed: bool) -> Self {
            use sys::cublasLtMatrixLayoutAttribute_t as Attribute;
            let get = |attribute| attribute!(cublasLtMatrixLayoutGetAttribute, layout, attribute, u64) as usize;
            Self {
                rows: get(Attribute::CUBLASLT_MATRIX_LAYOUT_ROWS),
                cols: get(Attribute::CUBLASLT_MATRIX_LAYOUT_COLS),
                stride: get(Attribute::CUBLASLT_MATRIX_LAYOUT_LD),
                is_transposed,
            }
        }
        /// Rows and columns as an operand.
        fn extents(&self) -> [usize; 2] {
            if self.is_transposed { [self.cols, self.rows] } else { [self.rows, self.cols] }
        }
        /// Where an element of the operand lies: columns are contiguous.
        fn at(&self, row: usize, col: usize) -> usize {
            let (row, col) = if self.is_transposed { (col, row) } else { (row, col) };
            row + col * self.stride
        }
    }

    /// Without a GPU the library multiplies nothing, but it tells what it was told: A·B of column-major matrices must be our product.
    #[test]
    fn descriptors_say_the_product() {
        if !is_there() {
            println!("no cuBLASLt");
            return;
        }
        // SAFETY: the library is loaded; the function takes nothing.
        println!("cuBLASLt {}", unsafe { sys::cublasLtGetVersion() });
        for layout in [Layout::Nn, Layout::Nt, Layout::Tn] {
            let product = product(layout, 256, [11, 13, 10]);
            let ([m, n, k], shapes) = (product.extents, product.shapes());
            let terms = Terms::new(&Key::of(&product), shapes).unwrap();
            preference(&Key::of(&product), 4 << 20).unwrap();

            use sys::cublasLtMatmulDescAttributes_t as Attribute;
            let [a_transposed, b_transposed] =
                [Attribute::CUBLASLT_MATMUL_DESC_TRANSA, Attribute::CUBLASLT_MATMUL_DESC_TRANSB]
                    .map(|at| attribute!(cublasLtMatmulDescGetAttribute, terms.product, at, i32) == 1);
            // As in the call: A is right, B is left.
            let (a, b) = (Told::new(&terms.right, a_transposed), Told::new(&terms.left, b_transposed));
            let d = Told::new(&terms.out, false);
            assert_eq!((a.extents(), b.extents(), d.extents()), ([n, k], [k, m], [n, m]), "{layout:?}");

            let left: Vec<usize> = (0..11 * 13).map(|at| at * at % 17).collect();
            let right: Vec<usize> = (0..13 * 13).map(|at| at * at % 19).collect();
            for i in 0..m {
                for j in 0..n {
                    let expected: usize = (0..k)
                        .map(|l| match layout {
                            Layout::Nn => left[i * 11 + l] * right[l * 13 + j],
                            Layout::Nt => left[i * 11 + l] * right[j * 13 + l],
                            Layout::Tn => left[l * 11 + i] * right[l * 13 + j],
                        })
                        .sum();
                    let found: usize = (0..k).map(|l| right[a.at(j, l)] * left[b.at(l, i)]).sum();
                    assert_eq!((d.at(j, i), found), (i * 10 + j, expected), "{layout:?} [{i},{j}]");
                }
            }
        }
        // Without a GPU this is an error, not a crash.
        if let Err(error) = result::create_handle().map(|raw| Owned { raw, destroy: result::destroy_handle }) {
            println!("no handle: {error}");
        }
    }
}
