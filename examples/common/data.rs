//! Data sets: MNIST-format image folders, and `.npy` or `.safetensors` files of activations.
//!
//! Whatever is wrong with a file is a [`DataError`] that names the file and the reason.

use flate2::read::MultiGzDecoder;
use half::{bf16, f16};
use npyz::{DType, NpyFile, NpyHeader, Order, TypeChar};
use rand::SeedableRng;
use rand::rngs::Xoshiro256PlusPlus;
use rand::seq::SliceRandom;
use safetensors::{Dtype, SafeTensors};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// A training and a test set.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// Where it came from and how it was split, in words.
    pub source: String,
    /// D, numbers in a row.
    pub inputs: usize,
    /// Height and width in pixels, if a row is an image.
    pub image: Option<(usize, usize)>,
    /// What is trained on.
    pub train: Part,
    /// What is measured on.
    pub test: Part,
}

/// Rows, with labels if there are any.
#[derive(Debug, Clone)]
pub struct Part {
    /// N.
    pub rows: usize,
    /// x \[N,D\], row by row; all finite. Pixels are in 0..=1.
    pub x: Vec<f32>,
    /// Class of each row \[N\].
    pub labels: Option<Vec<u8>>,
}

/// What is wrong with which file.
#[derive(Debug, thiserror::Error)]
#[error("{}: {fault}", path.display())]
pub struct DataError {
    /// The file or directory.
    pub path: PathBuf,
    /// What is wrong with it.
    pub fault: Fault,
}

/// What can be wrong with a file.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// There is no such file.
    #[error("no such file or directory")]
    Missing,
    /// No image file is in the directory.
    #[error("the directory has no train-images-idx3-ubyte or t10k-images-idx3-ubyte, plain or .gz")]
    NoImages,
    /// Neither a directory nor a file of a known kind.
    #[error("not a directory of MNIST-format files, nor a .npy or .safetensors file")]
    UnknownKind,
    /// The operating system's reason.
    #[error("cannot be read: {0}")]
    Unreadable(io::Error),
    /// A gzip stream that is cut short or damaged.
    #[error("the gzip stream is truncated or damaged: {0}")]
    Gzip(io::Error),
    /// The first four bytes are not those of the kind of file.
    #[error("the magic number is {found:#010x}, but {what} start with {expected:#010x}")]
    Magic {
        /// Kind of file.
        what: &'static str,
        /// What they start with.
        expected: u32,
        /// What this one starts with.
        found: u32,
    },
    /// Fewer bytes than a header has.
    #[error("has {found} bytes, fewer than the {expected} of its header")]
    NoHeader {
        /// Bytes of a header.
        expected: usize,
        /// Bytes of the file.
        found: usize,
    },
    /// Fewer bytes than the header says.
    #[error("truncated: the header announces {expected} bytes of data, but there are {found}")]
    TooShort {
        /// Bytes that the header announces.
        expected: usize,
        /// Bytes there are.
        found: usize,
    },
    /// More bytes than the header says.
    #[error("the header announces {expected} bytes of data, but there are more")]
    TooLong {
        /// Bytes that the header announces.
        expected: usize,
    },
    /// A header that no memory could hold.
    #[error("the header announces more data than can be addressed")]
    TooLarge,
    /// Labels of other images.
    #[error("has {labels} labels, but {} has {images} images", of.display())]
    LabelCount {
        /// Labels in this file.
        labels: usize,
        /// Images in the other.
        images: usize,
        /// The other.
        of: PathBuf,
    },
    /// Test images of another size than the training images.
    #[error("its images have {found} pixels, but the training images have {expected}")]
    ImageSize {
        /// Pixels of a training image.
        expected: usize,
        /// Pixels of an image in this file.
        found: usize,
    },
    /// No rows, or rows of no columns.
    #[error("the data is empty: {rows} rows of {cols} numbers")]
    Empty {
        /// Rows.
        rows: usize,
        /// Numbers in a row.
        cols: usize,
    },
    /// Too few rows for a training and a test set with a variance each.
    #[error("has {rows} row(s), but a training and a test set need at least {needed} together")]
    TooFewRows {
        /// Rows.
        rows: usize,
        /// Rows needed.
        needed: usize,
    },
    /// An element type that is not taken.
    #[error("holds {found}, but {expected} is needed")]
    ElementType {
        /// What it holds.
        found: String,
        /// What is taken.
        expected: &'static str,
    },
    /// Not a matrix.
    #[error("holds no matrix: the shape is {shape:?}, but two extents are needed")]
    Rank {
        /// Extents of what there is.
        shape: Vec<usize>,
    },
    /// A file of several tensors, none of them a matrix, or of none.
    #[error("holds {count} tensors, none of which has two extents")]
    NoMatrix {
        /// Tensors in the file.
        count: usize,
    },
    /// A number that is not one, or too large for f32.
    #[error("row {row}, column {col} is {value}, but all numbers must be finite as f32")]
    NotFinite {
        /// Counted from 0.
        row: usize,
        /// Counted from 0.
        col: usize,
        /// What stands there.
        value: f64,
    },
    /// What the reader of the format said.
    #[error("not a valid {format} file: {reason}")]
    Format {
        /// npy or safetensors.
        format: &'static str,
        /// What the reader said.
        reason: String,
    },
}

impl Fault {
    fn of(self, path: &Path) -> DataError {
        DataError { path: path.to_owned(), fault: self }
    }
}

type Result<T, E = DataError> = std::result::Result<T, E>;

/// The data that comes with the repository: MNIST's 10 000 test images.
pub fn default_directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("data")
}

/// Loads a directory of MNIST-format files, or a `.npy` or `.safetensors` file.
///
/// A source that has no test set of its own is split 80/20 after a shuffle, the same whatever the seed of a training is, so that
/// all are measured on the same rows.
pub fn load(path: &Path) -> Result<Dataset> {
    if !path.exists() {
        return Err(Fault::Missing.of(path));
    }
    if path.is_dir() {
        return load_images(path);
    }
    let matrix = match path.extension().and_then(|e| e.to_str()) {
        Some("npy") => read_npy(&read(path)?),
        Some("safetensors") => read_safetensors(&read(path)?),
        _ => Err(Fault::UnknownKind),
    };
    let Matrix { rows, cols, x } = matrix.map_err(|fault| fault.of(path))?;
    let all = Part { rows, x, labels: None };
    let (train, test) = split(all, cols).map_err(|fault| fault.of(path))?;
    Ok(Dataset { source: source(path, &train, &test, true), inputs: cols, image: None, train, test })
}

fn source(path: &Path, train: &Part, test: &Part, split: bool) -> String {
    let how = if split { ", split 80/20 after a shuffle" } else { "" };
    format!("{} ({} training rows, {} test rows{how})", path.display(), train.rows, test.rows)
}

/// The numbers of a file.
struct Matrix {
    rows: usize,
    cols: usize,
    x: Vec<f32>,
}

// Images

const IMAGES: (&str, u32) = ("MNIST-format images", 0x803);
const LABELS: (&str, u32) = ("MNIST-format labels", 0x801);

fn load_images(directory: &Path) -> Result<Dataset> {
    let find = |name: &str| {
        let plain = directory.join(name);
        let zipped = directory.join(format!("{name}.gz"));
        [plain, zipped].into_iter().find(|path| path.exists())
    };
    let load = |name: &str| -> Result<Option<Images>> {
        let Some(images) = find(&format!("{name}-images-idx3-ubyte")) else { return Ok(None) };
        let labels = format!("{name}-labels-idx1-ubyte");
        let labels = find(&labels).ok_or_else(|| Fault::Missing.of(&directory.join(labels)))?;
        load_pair(&images, &labels).map(Some)
    };
    let train = load("train")?;
    let test = load("t10k")?;
    let (size, train, test, is_split) = match (train, test) {
        (None, None) => return Err(Fault::NoImages.of(directory)),
        (Some(train), Some(test)) => {
            if test.size != train.size {
                let pixels = |(height, width): (usize, usize)| height * width;
                return Err(Fault::ImageSize { expected: pixels(train.size), found: pixels(test.size) }.of(&test.path));
            }
            (train.size, train.part, test.part, false)
        }
        (Some(all), None) | (None, Some(all)) => {
            let (train, test) = split(all.part, all.size.0 * all.size.1).map_err(|fault| fault.of(&all.path))?;
            (all.size, train, test, true)
        }
    };
    let source = source(directory, &train, &test, is_split);
    Ok(Dataset { source, inputs: size.0 * size.1, image: Some(size), train, test })
}

/// Images with their labels.
struct Images {
    path: PathBuf,
    /// Height and width in pixels.
    size: (usize, usize),
    part: Part,
}

fn load_pair(images: &Path, labels: &Path) -> Result<Images> {
    let (extents, pixels) = read_idx::<3>(images, IMAGES)?;
    let [rows, height, width] = extents;
    if rows == 0 || height == 0 || width == 0 {
        return Err(Fault::Empty { rows, cols: height * width }.of(images));
    }
    let ([count], classes) = read_idx::<1>(labels, LABELS)?;
    if count != rows {
        return Err(Fault::LabelCount { labels: count, images: rows, of: images.to_owned() }.of(labels));
    }
    let x = pixels.iter().map(|p| f32::from(*p) / 255.0).collect();
    let part = Part { rows, x, labels: Some(classes) };
    Ok(Images { path: images.to_owned(), size: (height, width), part })
}

/// Extents and bytes of an idx file, plain or gzipped.
fn read_idx<const RANK: usize>(path: &Path, (what, magic): (&'static str, u32)) -> Result<([usize; RANK], Vec<u8>)> {
    let file = File::open(path).map_err(|e| Fault::Unreadable(e).of(path))?;
    let zipped = path.extension().is_some_and(|e| e == "gz");
    let mut reader: Box<dyn Read> = if zipped { Box::new(MultiGzDecoder::new(file)) } else { Box::new(file) };
    let mut read = |limit: usize| -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let fault = if zipped { Fault::Gzip } else { Fault::Unreadable };
        reader.by_ref().take(limit as u64).read_to_end(&mut bytes).map_err(|e| fault(e).of(path))?;
        Ok(bytes)
    };
    let expected = 4 * (1 + RANK);
    let header = read(expected)?;
    let number = |at: usize| header.get(4 * at..4 * at + 4).map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]));
    if let Some(found) = number(0)
        && found != magic
    {
        return Err(Fault::Magic { what, expected: magic, found }.of(path));
    }
    let mut extents = [0; RANK];
    for (at, extent) in extents.iter_mut().enumerate() {
        let found = number(at + 1).ok_or_else(|| Fault::NoHeader { expected, found: header.len() }.of(path))?;
        *extent = found as usize;
    }
    let len = extents.iter().try_fold(1usize, |len, extent| len.checked_mul(*extent));
    let limit = len.and_then(|len| len.checked_add(1)).ok_or_else(|| Fault::TooLarge.of(path))?;
    // One byte more than announced, to see whether there is one. It also makes a gzip stream's checksum be read.
    let bytes = read(limit)?;
    let expected = limit - 1;
    match bytes.len() {
        found if found < expected => Err(Fault::TooShort { expected, found }.of(path)),
        found if found > expected => Err(Fault::TooLong { expected }.of(path)),
        _ => Ok((extents, bytes)),
    }
}

// Matrices

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|e| Fault::Unreadable(e).of(path))
}

fn read_npy(bytes: &[u8]) -> Result<Matrix, Fault> {
    let format = |e: &dyn std::fmt::Display| Fault::Format { format: "npy", reason: e.to_string() };
    let mut rest = bytes;
    let header = NpyHeader::from_reader(&mut rest).map_err(|e| format(&e))?;
    let expected = "a float16, float32 or float64 array";
    let type_error = || Fault::ElementType { found: header.dtype().descr(), expected };
    let size = match header.dtype() {
        DType::Plain(kind) if kind.type_char() == TypeChar::Float => kind.num_bytes().ok_or_else(type_error)?,
        _ => return Err(type_error()),
    };
    let shape: Vec<usize> = header.shape().iter().map(|extent| *extent as usize).collect();
    let (rows, cols) = matrix_extents(&shape)?;
    check_bytes(rows, cols, size, rest.len())?;
    let order = header.order();
    let file = NpyFile::with_header(header.clone(), rest);
    let values: Vec<f64> = match size {
        2 => file.into_vec::<f16>().map(|v| v.into_iter().map(f64::from).collect()),
        4 => file.into_vec::<f32>().map(|v| v.into_iter().map(f64::from).collect()),
        8 => file.into_vec::<f64>(),
        _ => return Err(type_error()),
    }
    .map_err(|e| format(&e))?;
    match order {
        Order::C => finite(rows, cols, |at| values[at]),
        Order::Fortran => finite(rows, cols, |at| values[at % cols * rows + at / cols]),
    }
}

/// The first tensor with two extents, or the only one.
fn read_safetensors(bytes: &[u8]) -> Result<Matrix, Fault> {
    let format = |e: &dyn std::fmt::Display| Fault::Format { format: "safetensors", reason: e.to_string() };
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|e| format(&e))?;
    let tensors = SafeTensors::deserialize(bytes).map_err(|e| format(&e))?;
    // Names in the order of the data.
    let names = metadata.offset_keys();
    let shape = |name: &str| metadata.info(name).map_or(&[][..], |info| &info.shape);
    let name = match (names.iter().find(|name| shape(name).len() == 2), &names[..]) {
        (Some(name), _) => name,
        (None, [only]) => return Err(Fault::Rank { shape: shape(only).to_vec() }),
        (None, _) => return Err(Fault::NoMatrix { count: names.len() }),
    };
    let tensor = tensors.tensor(name).map_err(|e| format(&e))?;
    let (rows, cols) = matrix_extents(tensor.shape())?;
    let data = tensor.data();
    let number: Box<dyn Fn(usize) -> f64> = match tensor.dtype() {
        Dtype::F64 => Box::new(|at| f64::from_le_bytes(array(data, at))),
        Dtype::F32 => Box::new(|at| f32::from_le_bytes(array(data, at)).into()),
        Dtype::F16 => Box::new(|at| f16::from_le_bytes(array(data, at)).into()),
        Dtype::BF16 => Box::new(|at| bf16::from_le_bytes(array(data, at)).into()),
        other => {
            let expected = "a tensor of F16, BF16, F32 or F64";
            return Err(Fault::ElementType { found: format!("{other:?} in \"{name}\""), expected });
        }
    };
    finite(rows, cols, number)
}

/// The `at`th group of `SIZE` bytes.
fn array<const SIZE: usize>(data: &[u8], at: usize) -> [u8; SIZE] {
    let mut bytes = [0; SIZE];
    bytes.copy_from_slice(&data[at * SIZE..(at + 1) * SIZE]);
    bytes
}

fn matrix_extents(shape: &[usize]) -> Result<(usize, usize), Fault> {
    match *shape {
        [rows, cols] if rows == 0 || cols == 0 => Err(Fault::Empty { rows, cols }),
        [rows, cols] => Ok((rows, cols)),
        _ => Err(Fault::Rank { shape: shape.to_vec() }),
    }
}

fn check_bytes(rows: usize, cols: usize, size: usize, found: usize) -> Result<(), Fault> {
    let expected = rows.checked_mul(cols).and_then(|len| len.checked_mul(size)).ok_or(Fault::TooLarge)?;
    match found {
        found if found < expected => Err(Fault::TooShort { expected, found }),
        found if found > expected => Err(Fault::TooLong { expected }),
        _ => Ok(()),
    }
}

/// The matrix of `number(row · cols + col)`, if all are finite as f32.
fn finite(rows: usize, cols: usize, number: impl Fn(usize) -> f64) -> Result<Matrix, Fault> {
    let x: Vec<f32> = (0..rows * cols).map(|at| number(at) as f32).collect();
    match x.iter().position(|x| !x.is_finite()) {
        Some(at) => Err(Fault::NotFinite { row: at / cols, col: at % cols, value: number(at) }),
        None => Ok(Matrix { rows, cols, x }),
    }
}

/// 80 % to train on and 20 % to measure on, after a shuffle.
fn split(all: Part, cols: usize) -> Result<(Part, Part), Fault> {
    let test = all.rows / 5;
    if test < 2 {
        return Err(Fault::TooFewRows { rows: all.rows, needed: 10 });
    }
    let mut order: Vec<usize> = (0..all.rows).collect();
    order.shuffle(&mut Xoshiro256PlusPlus::seed_from_u64(0));
    let take = |rows: &[usize]| Part {
        rows: rows.len(),
        x: rows.iter().flat_map(|row| &all.x[row * cols..(row + 1) * cols]).copied().collect(),
        labels: all.labels.as_ref().map(|labels| rows.iter().map(|row| labels[*row]).collect()),
    };
    let (test, train) = order.split_at(test);
    Ok((take(train), take(test)))
}
