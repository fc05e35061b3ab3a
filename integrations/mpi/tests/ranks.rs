//! A step over 1, 2 and 4 ranks against the step of one process; ranks that fail or disagree.
//!
//! This program starts itself under mpirun, with the name of a case: then it is a rank.

mod common;

use common::{Ended, mpirun, relative};
use libtest_mimic::{Arguments, Failed, Trial};
use mpi::traits::*;
use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};
use sae_kernels::{
    Activation, Backend, Cpu, DecoderFree, DecoderFreeConfig, DecoderFreeStep, Element, Host, Isa, MatMut, MatRef,
    Objective, Reduction, Reference, Shape,
};
use sae_kernels_mpi::Error;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::time::{Duration, SystemTime};

const RANK: &str = "rank-of";
const WORLDS: [usize; 3] = [1, 2, 4];
const SHAPE: Shape = Shape { rows: 130, inputs: 20, latents: 33 };
/// From what goes wrong on one rank to the end of all.
const SECONDS: f64 = 5.0;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, mode, case, folder] = &arguments[..]
        && mode == RANK
    {
        return rank(case, Path::new(folder));
    }
    let mut trials = Vec::new();
    for ranks in WORLDS {
        trials.push(Trial::test(format!("step_of_{ranks}_is_step_of_one"), move || steps(ranks)));
        trials.push(Trial::test(format!("sums_of_{ranks}_in_order"), move || sums(ranks)));
    }
    for ranks in [2, 4] {
        for wrong in WRONG {
            let name = format!("{}_on_{ranks}", wrong.case);
            trials.push(Trial::test(name, move || ends(wrong, ranks)));
        }
    }
    // Ranks that share cores with other jobs' ranks would be slower, and their time is taken.
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    libtest_mimic::run(&arguments, trials).exit();
}

/// This rank's part of a case.
fn rank(case: &str, folder: &Path) {
    sae_kernels_mpi::run(|world| match case {
        "steps" => leave(world, folder, &(run_steps(world, Reference)?, run_steps(world, cpu())?)),
        "sums" => leave(world, folder, &run_sums(world)),
        _ => go_wrong(world, case, folder),
    });
}

type Anyhow = Result<(), anyhow::Error>;

/// For the driver.
fn leave(world: &impl Communicator, folder: &Path, found: &impl Serialize) -> Anyhow {
    Ok(std::fs::write(folder.join(world.rank().to_string()), serde_json::to_vec(found)?)?)
}

/// Runs a case, and what each rank left.
fn run_case<T: for<'a> Deserialize<'a>>(case: &str, ranks: usize) -> Result<Vec<T>, Failed> {
    let folder = tempfile::tempdir()?;
    let ended = start(case, ranks, folder.path())?;
    if !ended.status.success() {
        return Err(format!("{ended:?}").into());
    }
    let read = |rank: usize| Ok(serde_json::from_slice(&std::fs::read(folder.path().join(rank.to_string()))?)?);
    (0..ranks).map(read).collect()
}

fn start(case: &str, ranks: usize, folder: &Path) -> Result<Ended, Failed> {
    Ok(mpirun(ranks, &std::env::current_exe()?, [RANK.as_ref(), case.as_ref(), folder.as_os_str()]))
}

// Steps

/// A batch and what is to be made of it.
#[derive(Clone)]
struct Problem {
    name: &'static str,
    objective: Objective,
    activation: Activation,
    /// Added to the biases: how many deviations activations are from 0, about.
    offset: f64,
}

fn problems() -> Vec<Problem> {
    let paper = Objective::default();
    let weights = Objective { lambda_lse: 0.75, lambda_var: 0.5, lambda_tc: 0.25, lambda_wr: 0.125, ..paper };
    let (activation, offset) = (Activation::Relu, 0.0);
    vec![
        Problem { name: "paper", objective: paper, activation, offset },
        Problem { name: "weights", objective: weights, activation, offset },
        Problem { name: "mean", objective: Objective { reduction: Reduction::Mean, ..weights }, activation, offset },
        Problem { name: "without tc", objective: Objective { lambda_tc: 0.0, ..weights }, activation, offset },
        Problem { name: "softplus", objective: weights, activation: Activation::Softplus, offset },
        Problem { name: "far from 0", objective: weights, activation, offset: 1e5 },
    ]
}

impl Problem {
    /// x \[N,D\], weight \[H,D\] and bias \[H\], the same everywhere; all numbers of f32.
    fn inputs<R: Element>(&self) -> [Vec<R>; 3] {
        let Shape { rows, inputs, latents } = SHAPE;
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(7);
        let mut draw = |len: usize, scale: f64, offset: f64| -> Vec<R> {
            (0..len).map(|_| R::from_f32((offset + scale * rng.random_range(-1.0..1.0)) as f32)).collect()
        };
        [draw(rows * inputs, 1.0, 0.5), draw(latents * inputs, 0.3, 0.0), draw(latents, 0.1, self.offset)]
    }

    /// `rows`: of the plan. Blocks are smaller than most shards.
    fn model<B: Backend>(&self, backend: B) -> DecoderFree<B> {
        let (objective, activation) = (self.objective, self.activation);
        let config = DecoderFreeConfig { objective, activation, block_rows: Some(50), ..DecoderFreeConfig::new(SHAPE) };
        DecoderFree::new(backend, config).unwrap()
    }
}

/// Rows of each rank. Some have none: the first, one between, the last.
fn shards(ranks: usize) -> &'static [&'static [usize]] {
    match ranks {
        1 => &[&[130]],
        2 => &[&[65, 65], &[129, 1], &[0, 130], &[130, 0]],
        4 => &[&[33, 32, 40, 25], &[0, 127, 0, 3], &[1, 0, 128, 1], &[0, 0, 0, 130]],
        _ => unreachable!("no shards for {ranks} ranks"),
    }
}

/// Losses (lse, var, tc, wr, total) and gradients [H·D + H] of a step.
#[derive(Serialize, Deserialize, Debug, PartialEq)]
struct Found {
    losses: [f64; 5],
    gradients: Vec<f64>,
}

fn found<R: Element>(losses: sae_kernels::Losses, gradients: &[R]) -> Found {
    let sae_kernels::Losses { lse, var, tc, wr, total } = losses;
    Found { losses: [lse, var, tc, wr, total], gradients: gradients.iter().map(|g| g.to_f64()).collect() }
}

fn cpu() -> Cpu<f32> {
    Cpu::with(Isa::detect(), 1).unwrap()
}

/// All problems, with all shards.
fn run_steps<R, B>(world: &impl Communicator, backend: B) -> Result<Vec<Found>, anyhow::Error>
where
    R: Element + Equivalence,
    B: Backend<Memory = Host, Element = R, Real = R> + Clone,
{
    let Shape { inputs: d, latents: h, .. } = SHAPE;
    let (rank, ranks) = (world.rank() as usize, world.size() as usize);
    let mut all = Vec::new();
    for problem in problems() {
        let [x, weight, bias] = problem.inputs::<R>();
        let mut model = problem.model(backend.clone());
        for shards in shards(ranks) {
            let first: usize = shards[..rank].iter().sum();
            let x = MatRef::new(&x[first * d..(first + shards[rank]) * d], shards[rank], d)?;
            let weight = MatRef::new(&weight, h, d)?;
            // Left from another step.
            let mut gradients = vec![R::from_f64(f64::NAN); h * d + h];
            let losses = sae_kernels_mpi::step(world, &mut model, x, weight, &bias, &mut gradients)?;
            all.push(found(losses, &gradients));
        }
    }
    Ok(all)
}

/// The same by one process, without MPI.
fn one_process<R, B>(problem: &Problem, backend: B) -> Found
where
    R: Element,
    B: Backend<Memory = Host, Element = R, Real = R>,
{
    let Shape { rows, inputs: d, latents: h } = SHAPE;
    let [x, weight, bias] = problem.inputs::<R>();
    let mut gradients = vec![R::from_f64(0.0); h * d + h];
    let (grad_weight, grad_bias) = gradients.split_at_mut(h * d);
    let mut model = problem.model(backend);
    let step = DecoderFreeStep {
        x: MatRef::new(&x, rows, d).unwrap(),
        weight: MatRef::new(&weight, h, d).unwrap(),
        bias: &bias[..],
        grad_weight: MatMut::new(grad_weight, h, d).unwrap(),
        grad_bias,
        grad_x: None,
        activations: None,
        row_loss: None,
    };
    model.step(step).unwrap();
    found(model.losses().unwrap(), &gradients)
}

fn steps(ranks: usize) -> Result<(), Failed> {
    let all: Vec<(Vec<Found>, Vec<Found>)> = run_case("steps", ranks)?;
    for (rank, found) in all.iter().enumerate() {
        assert!(*found == all[0], "rank {rank} has other bits than rank 0");
    }
    assert!(run_case::<(Vec<Found>, Vec<Found>)>("steps", ranks)? == all, "a second time gives other bits");
    let (float64, float32) = &all[0];
    let shards = shards(ranks);
    assert_eq!(float64.len(), problems().len() * shards.len());
    for (at, problem) in problems().iter().enumerate() {
        let truth = one_process(problem, Reference);
        let single = one_process(problem, cpu());
        let (weight, losses) = (truth.gradients.len(), truth.losses.len());
        assert_eq!((weight, losses), (SHAPE.latents * (SHAPE.inputs + 1), 5));
        for (shard, rows) in shards.iter().enumerate() {
            let context = format!("{}, {rows:?}", problem.name);
            // The same sums in another order, so what counts is the rounding of f64: 130 rows, and 33 latents of which the correlation
            // loss adds 33² squares, make some thousand roundings of 1.1e-16, of which most cancel. Far from 0 the activations, z = 1e5 ± 1
            // or so, have been rounded in encoding: the same in all, but the sums about a shift are of numbers of 1e5.
            let bar = if problem.offset == 0.0 { 1e-13 } else { 1e-9 };
            let found = &float64[at * shards.len() + shard];
            close(&format!("{context}, f64"), found, &truth, |_| bar)?;
            // The bar of f32, with our own step of one process for the plain implementation; and one rounding of each rank's part.
            let found = &float32[at * shards.len() + shard];
            if problem.offset == 0.0 {
                close(&format!("{context}, f32"), found, &truth, |of| 2.0 * of(&single, &truth) + 1e-7)?;
            }
        }
    }
    Ok(())
}

/// An error of the first, with the second as the truth.
type Measure<'a> = &'a dyn Fn(&Found, &Found) -> f64;

/// Errors of the losses, added up so that NaN is no good one.
fn loss_error(found: &Found, truth: &Found) -> f64 {
    let all: f64 = truth.losses.iter().map(|loss| loss.abs()).sum();
    let size = |at: usize| if at == 4 { all } else { truth.losses[at].abs() };
    let error = |at: usize| (found.losses[at] - truth.losses[at]).abs();
    // A term without weight is 0.
    (0..5).map(|at| if error(at) == 0.0 { 0.0 } else { error(at) / size(at) }).sum()
}

/// Gradients by their norm, each loss by its size, and the total by the size of what it sums.
fn close(context: &str, found: &Found, truth: &Found, bar: impl Fn(Measure<'_>) -> f64) -> Result<(), Failed> {
    let split = SHAPE.latents * SHAPE.inputs;
    let measures: [(&str, Measure<'_>); 3] = [
        ("losses", &loss_error),
        ("grad_weight", &|found, truth| relative(&found.gradients[..split], &truth.gradients[..split])),
        ("grad_bias", &|found, truth| relative(&found.gradients[split..], &truth.gradients[split..])),
    ];
    for (name, measure) in measures {
        let (error, bar) = (measure(found, truth), bar(measure));
        if error.is_nan() || error > bar {
            return Err(format!("{context}: {name} is off by {error:e}, and {bar:e} is allowed").into());
        }
    }
    Ok(())
}

// Sums

/// More numbers than are sent at a time, and no multiple of the ranks; none; one.
const LENGTHS: [usize; 4] = [(1 << 22) + 5, 0, 1, 7];

/// A number of a rank's. Added in another order, or in f32, many of these give other bits.
fn number(rank: usize, at: usize) -> f32 {
    let mixed = ((at * 31 + rank * 17 + 1) as u32).wrapping_mul(0x9e37_79b9);
    (mixed >> 8) as f32 * [1.0, 1e-3, -1e4, 1e-7][(at + rank) % 4]
}

/// How many sums are not what the formula says, of f32 and of f64.
fn run_sums(world: &impl Communicator) -> Vec<[usize; 2]> {
    let (rank, ranks) = (world.rank() as usize, world.size() as usize);
    let wrong = |len: usize| {
        let mut narrow: Vec<f32> = (0..len).map(|at| number(rank, at)).collect();
        let mut wide: Vec<f64> = (0..len).map(|at| f64::from(number(rank, at)) / 3.0).collect();
        sae_kernels_mpi::sum(world, &mut narrow);
        sae_kernels_mpi::sum(world, &mut wide);
        let narrow = narrow.iter().enumerate().filter(|(at, sum)| {
            **sum != (1..ranks).fold(f64::from(number(0, *at)), |sum, rank| sum + f64::from(number(rank, *at))) as f32
        });
        let wide = wide.iter().enumerate().filter(|(at, sum)| {
            let term = |rank| f64::from(number(rank, *at)) / 3.0;
            **sum != (1..ranks).fold(term(0), |sum, rank| sum + term(rank))
        });
        [narrow.count(), wide.count()]
    };
    LENGTHS.map(wrong).to_vec()
}

fn sums(ranks: usize) -> Result<(), Failed> {
    let all: Vec<Vec<[usize; 2]>> = run_case("sums", ranks)?;
    assert_eq!(all, vec![vec![[0, 0]; LENGTHS.len()]; ranks], "sums that are wrong");
    // The numbers are such that the order is seen.
    let of = |order: &[usize], at| order.iter().fold(0.0, |sum, rank| sum + f64::from(number(*rank, at)) / 3.0);
    assert!((0..100).any(|at| of(&[0, 1, 2, 3], at) != of(&[3, 2, 1, 0], at)));
    Ok(())
}

// What goes wrong

/// Something that goes wrong on the last rank, and what is to be read then.
struct Wrong {
    case: &'static str,
    says: &'static [&'static str],
}

const WRONG: &[Wrong] = &[
    Wrong { case: "panics", says: &["ends all ranks", "the rank's own panic"] },
    Wrong { case: "thread_panics", says: &["ends all ranks", "a thread's own panic"] },
    Wrong { case: "fails", says: &["ends all ranks: the rank's own error"] },
    Wrong { case: "misfit", says: &["x is 10×21, but the other arguments need 10×20"] },
    Wrong { case: "gradients", says: &["gradients has 692 elements, but the other arguments need 693"] },
    Wrong { case: "inputs", says: &["a step of 21 inputs", "but rank 0 computes a step of 20 inputs"] },
    Wrong { case: "latents", says: &["and 34 latents", "but rank 0 computes a step of 20 inputs and 33 latents"] },
    Wrong { case: "type", says: &["in f64", "but rank 0", "in f32"] },
    Wrong { case: "activation", says: &["Softplus", "but rank 0", "Relu"] },
    Wrong { case: "objective", says: &["lambda_tc: 1.0000000000000002", "but rank 0", "lambda_tc: 1.0"] },
    Wrong { case: "weight", says: &["checksum", "but rank 0"] },
    Wrong { case: "bias", says: &["checksum", "but rank 0"] },
    Wrong { case: "leaves_early", says: &["is done, but rank 0 computes a step"] },
    Wrong { case: "too_few_rows", says: &["the batch has 1 row(s)"] },
    // MPI's own message, not ours.
    Wrong { case: "exits", says: &["mpirun"] },
];

/// Two good steps, then `case` on the last rank, while the others do a third.
fn go_wrong(world: &impl Communicator, case: &str, folder: &Path) -> Anyhow {
    let good =
        Case { inputs: 20, latents: 33, objective: Objective::default(), activation: Activation::Relu, flip: None };
    let few = case == "too_few_rows";
    good.step::<f32, _>(world, cpu(), 10, 0)?;
    good.step::<f32, _>(world, cpu(), 10, 0)?;
    if world.rank() != world.size() - 1 {
        return good.step::<f32, _>(world, cpu(), if few { 0 } else { 10 }, 0);
    }
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
    std::fs::write(folder.join("time"), now.as_secs_f64().to_string())?;
    let tc = Objective { lambda_tc: 1.0f64.next_up(), ..good.objective };
    let wrong = match case {
        "panics" => panic!("the rank's own panic"),
        "thread_panics" => {
            std::thread::spawn(|| panic!("a thread's own panic")).join().unwrap_or(());
            // Reached if the thread has not ended the job.
            std::thread::sleep(Duration::from_secs(60));
            good
        }
        "fails" => anyhow::bail!("the rank's own error"),
        "exits" => std::process::exit(0),
        "leaves_early" => return Ok(()),
        "misfit" => {
            let x = [0.0; 210];
            let (weight, bias) = ([0.0; 660], [0.0; 33]);
            let mut model = good.model(cpu());
            let (x, weight) = (MatRef::new(&x, 10, 21)?, MatRef::new(&weight, 33, 20)?);
            sae_kernels_mpi::step(world, &mut model, x, weight, &bias, &mut [0.0; 693])?;
            good
        }
        "gradients" => return good.step::<f32, _>(world, cpu(), 10, 1),
        "type" => return good.step::<f64, _>(world, Reference, 10, 0),
        "inputs" => Case { inputs: 21, ..good },
        "latents" => Case { latents: 34, ..good },
        "activation" => Case { activation: Activation::Softplus, ..good },
        "objective" => Case { objective: tc, ..good },
        "weight" => Case { flip: Some(659), ..good },
        "bias" => Case { flip: Some(660 + 32), ..good },
        "too_few_rows" => return good.step::<f32, _>(world, cpu(), 1, 0),
        _ => unreachable!("no case {case}"),
    };
    wrong.step::<f32, _>(world, cpu(), 10, 0)
}

struct Case {
    inputs: usize,
    latents: usize,
    objective: Objective,
    activation: Activation,
    /// A parameter that is another number on this rank.
    flip: Option<usize>,
}

impl Case {
    fn model<B: Backend>(&self, backend: B) -> DecoderFree<B> {
        let shape = Shape { rows: 10, inputs: self.inputs, latents: self.latents };
        let (objective, activation) = (self.objective, self.activation);
        DecoderFree::new(backend, DecoderFreeConfig { objective, activation, ..DecoderFreeConfig::new(shape) }).unwrap()
    }

    /// `lacking`: gradients that there is no room for.
    fn step<R, B>(&self, world: &impl Communicator, backend: B, rows: usize, lacking: usize) -> Anyhow
    where
        R: Element + Equivalence,
        B: Backend<Memory = Host, Element = R, Real = R>,
    {
        let &Self { inputs: d, latents: h, .. } = self;
        let x: Vec<R> = (0..rows * d).map(|at| R::from_f64(f64::from(number(3, at)) / 1e7)).collect();
        let mut parameters: Vec<R> = (0..h * d + h).map(|at| R::from_f64(f64::from(number(0, at)) / 1e8)).collect();
        if let Some(at) = self.flip {
            parameters[at] = R::from_f64(-parameters[at].to_f64());
        }
        let (weight, bias) = parameters.split_at(h * d);
        let mut gradients = vec![R::from_f64(0.0); h * d + h - lacking];
        let (x, weight) = (MatRef::new(&x, rows, d)?, MatRef::new(weight, h, d)?);
        let result = sae_kernels_mpi::step(world, &mut self.model(backend), x, weight, bias, &mut gradients);
        if let Err(Error::Disagreement { rank, .. }) = &result {
            assert_eq!(*rank, world.size() as usize - 1, "the rank that differs");
        }
        Ok(result.map(drop)?)
    }
}

fn ends(wrong: &Wrong, ranks: usize) -> Result<(), Failed> {
    let folder = tempfile::tempdir()?;
    let ended = start(wrong.case, ranks, folder.path())?;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs_f64();
    let seconds = now - std::fs::read_to_string(folder.path().join("time"))?.parse::<f64>()?;
    assert!(!ended.status.success(), "the job ended as if all were well: {ended:?}");
    for text in wrong.says {
        assert!(ended.stderr.contains(text), "{text:?} is not said: {}", ended.stderr);
    }
    assert!(seconds < SECONDS, "it took {seconds:.1} s");
    Ok(())
}
