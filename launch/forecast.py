"""`launch/train.py --plan`: what a recipe will need and how it would scale, told without data and without training."""

import argparse
from typing import Any

from medlaunch.tasks import DOORS
from medtrain.errors import UserError

GPUS = (1, 8, 64, 512)
SHARE = 0.92  # of a memory that can be filled before its free places are too small


DEFAULTS = {"on": None, "memory_gb": None, "ranks": 1, "nodes": None, "gpus": 8, "step_s": None, "link_gb_s": 300.0,
            "net_gb_s": 50.0, "hop_us": 5.0}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a plan."""
    group = parser.add_argument_group("plan", "memory, largest batch and scaling, told without data and training")
    group.add_argument("--plan", action="store_true", help="tell it and end")
    group.add_argument("--on", choices=("gpu", "cpu"), help="where it is to run (default: as here)")
    group.add_argument(
        "--memory-gb", type=float, metavar="GB", help="memory of a GPU, or of the host (default: as here)"
    )
    group.add_argument("--ranks", type=int, metavar="R", help="processes that share the recipe's batch (default: 1)")
    group.add_argument("--nodes", type=int, metavar="N",
                       help="predict step times up to N nodes; each GPU keeps its share of the batch")  # fmt: skip
    group.add_argument("--gpus", type=int, metavar="G", help="GPUs of a node (default: 8)")
    group.add_argument("--step-s", type=float, metavar="S",
                       help="seconds of a step, measured on one GPU (default: measured here)")  # fmt: skip
    group.add_argument("--link-gb-s", type=float, metavar="GB",
                       help="GB a second of a GPU inside its node (default: 300, NVLink)")  # fmt: skip
    group.add_argument("--net-gb-s", type=float, metavar="GB",
                       help="GB a second of a node to the others (default: 50, one adapter of 400 Gb/s)")  # fmt: skip
    group.add_argument("--hop-us", type=float, metavar="US", help="microseconds between neighbours (default: 5)")
    group.set_defaults(**DEFAULTS)


def refuse_without_plan(options: argparse.Namespace) -> None:
    """UserError where an option of a plan is given to a training."""
    for name, default in DEFAULTS.items():
        if getattr(options, name) != default:
            raise UserError(f"--{name.replace('_', '-')} belongs to a plan: add --plan, or leave it out.")


def forecast(recipe: Any, options: argparse.Namespace) -> None:
    """Print the plan of a recipe."""
    for name in ("ranks", "memory_gb", "nodes", "gpus", "step_s", "link_gb_s", "net_gb_s", "hop_us"):
        value = getattr(options, name)
        if value is not None and not 0 < value < 1e9:
            raise UserError(f"--{name.replace('_', '-')} {value}: give a number above 0.")
    from medtrain.estimate import sizes_of
    from medtrain.settings import check_settings

    together = (options.nodes or 0) * options.gpus or options.ranks
    share = samples_at_once(recipe, options.ranks) * recipe.train.accumulate
    check_settings(recipe.override([f"train.batch={share * together}"]), together)
    place, door = place_of(recipe, options), DOORS[recipe.task]
    sizes = sizes_of(lambda batch: door.example(recipe, batch, place.device), place)
    print(f"{recipe.name}: {sizes.weights // 4:,} trained parameters, {sizes.flops / 1e12:.3g} TFLOP a sample and "
          f"step, {place.precision} on a {'GPU' if place.gpu else 'CPU'}\n")  # fmt: skip
    say_memory(recipe, sizes, place, options)
    if options.nodes:
        say_scaling(recipe, sizes, place, options)


def place_of(recipe: Any, options: argparse.Namespace) -> Any:
    """Where the step is to run, and with what it is traced; raises UserError where that can not be told."""
    import torch

    from medtrain.estimate import Place
    from medtrain.precision import precision_for

    here = torch.cuda.is_available()
    gpu = here if options.on is None else options.on == "gpu"
    device = torch.device("cuda" if gpu and here else "cpu")
    if not gpu or here:
        return Place(gpu, precision_for(recipe, device), device)
    if options.memory_gb is None:
        raise UserError("--on gpu: there is no GPU here whose memory could be read: give --memory-gb.")
    if options.nodes and options.step_s is None:
        raise UserError("--on gpu: there is no GPU here to measure a step on: give --step-s.")
    return Place(gpu, "bf16" if recipe.train.precision == "auto" else recipe.train.precision, device)


def say_memory(recipe: Any, sizes: Any, place: Any, options: argparse.Namespace) -> None:
    """The table of one rank's memory, and the largest batch."""
    from medtrain.estimate import largest_batch, memory_bytes, memory_of_rank, process_bytes
    from medtrain.tables import to_markdown

    ranks, batch = (options.nodes or 0) * options.gpus or options.ranks, samples_at_once(recipe, options.ranks)
    parts = memory_of_rank(sizes, recipe, ranks, batch)
    process, tensors = process_bytes(place), parts.pop("together")
    parts |= {"process itself": process, "together": tensors + process}
    head = f"memory of {'one of ' if ranks > 1 else ''}{ranks} rank{'s' if ranks > 1 else ''}, micro-batch {batch}"
    print(to_markdown([[head, "GB"], *([name, f"{value / 1e9:.2f}"] for name, value in parts.items())]))
    there = options.memory_gb * 1e9 if options.memory_gb else memory_bytes(place.device)
    largest = largest_batch(sizes, recipe, ranks, SHARE * there - process)
    words = f"largest micro-batch in {there / 1e9:.3g} GB, {SHARE:.0%} of them used:"
    if largest:
        print(f"{words} {largest}, which is train.batch={largest * ranks * recipe.train.accumulate}")
    else:
        print(f"{words} none; lower {DOORS[recipe.task].MEMORY_FIELDS.split(' or ')[-1]}")
    print("eager mode and no kernels, which need less; processes that load data are not counted")


def samples_at_once(recipe: Any, ranks: int) -> int:
    """A rank's micro-batch where so many share the recipe's batch."""
    share = recipe.train.accumulate * ranks
    if recipe.train.batch % share:
        raise UserError(f"--ranks {ranks}: train.batch={recipe.train.batch} can not be shared by {share}.")
    return int(recipe.train.batch // share)


def say_scaling(recipe: Any, sizes: Any, place: Any, options: argparse.Namespace) -> None:
    """The table of predicted step times."""
    from medtrain.estimate import step_seconds as measured
    from medtrain.scaling import Links, step_seconds
    from medtrain.tables import to_markdown

    per_node, most, batch = options.gpus, options.nodes * options.gpus, samples_at_once(recipe, options.ranks)
    alone, origin = options.step_s, "given"
    if alone is None:
        print(f"\nmeasuring a step of {batch} samples here ...", flush=True)
        door = DOORS[recipe.task]
        by_ddp = most > 1 and recipe.train.strategy == "ddp" and recipe.train.compile == "auto"  # never replayed
        asked = recipe.override(["train.compile=off"]) if by_ddp else recipe
        alone = measured(lambda n: door.example(asked, n, place.device), asked, batch, place.device)
        origin = "measured here"
    links = Links(options.link_gb_s * 1e9, options.net_gb_s * 1e9, options.hop_us / 1e6)
    stage = recipe.train.zero if recipe.train.strategy == "deepspeed" else 0
    overlaps = not averages_in_one_piece(recipe, sizes, place, most)
    lines = [["GPUs", "nodes", "samples a step", "step s", "samples/s", "efficiency"]]
    for gpus in sorted({*(count for count in GPUS if count < most), most}):
        spent = step_seconds(alone, sizes.weights, gpus, per_node, links, stage, overlaps)
        lines.append([str(gpus), str(-(-gpus // per_node)), str(gpus * batch), f"{spent:.4g}",
                      f"{gpus * batch / spent:.4g}", f"{alone / spent:.1%}"])  # fmt: skip
    print(f"\nprediction from a step of {alone:.4g} s ({origin}) with {batch} samples a GPU, "
          f"{sizes.weights / 1e6:.0f} MB of gradients,\n{options.link_gb_s:g} GB/s in a node, "
          f"{options.net_gb_s:g} GB/s between nodes, {options.hop_us:g} us a hop:\n")  # fmt: skip
    print(to_markdown(lines))
    way = "that overlaps with the backward pass" if overlaps else "after the backward pass, in one piece"
    print(f"ring all-reduce {way}; waiting for data or for slower GPUs is not in it")


def averages_in_one_piece(recipe: Any, sizes: Any, place: Any, gpus: int) -> bool:
    """Whether several GPUs replay their steps and average gradients after them, rather than by DDP meanwhile."""
    from medtrain.settings import replay_refusal

    replays = recipe.train.compile == "replay" or (recipe.train.compile == "auto" and sizes.replays)
    return bool(place.gpu and gpus > 1 and replays and not replay_refusal(recipe, gpus))
