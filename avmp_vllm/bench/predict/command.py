"""``avmp bench predict``: forecasts of answer lengths on any trace, test then train."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import numpy as np

from avmp_vllm.bench import results
from avmp_vllm.bench.inputs import InputError
from avmp_vllm.bench.predict import answers, report
from avmp_vllm.bench.predict.cost import costs
from avmp_vllm.bench.predict.judge import Judge, cuts
from avmp_vllm.bench.predict.models import MIXED, MODELS, SHORT, Mixed
from avmp_vllm.bench.predict.reservations import PAGED, RULES, Ledger, paged
from avmp_vllm.bench.status import exit_status
from avmp_vllm.predict.bins import LengthBins
from avmp_vllm.predict.features import Known
from avmp_vllm.predict.forecaster import PER_OCTAVE, Forecast

BENCHMARK = "predict"
_PARAMETERS = ["trace", "seed", "longest", "token_ms"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's arguments."""
    parser.add_argument(
        "--trace",
        nargs="+",
        help=".csv, .jsonl, .json (ShareGPT), Alpaca's lengths (.csv@column), lognormal; "
        "A+B[:1000] is a drift",
    )
    parser.add_argument("--seed", type=int, default=0, help="of what a trace leaves open (0)")
    parser.add_argument("--longest", type=int, default=16384, help="longest answer (16384)")
    parser.add_argument(
        "--token-ms",
        type=float,
        default=30.0,
        help="an answer grows by a token every so many ms, and is learned when it ends (30); 0: "
        "learned before the next request arrives",
    )
    results.add_arguments(parser, BENCHMARK)


def _validate(parameters: Mapping[str, Any]) -> None:
    if not parameters["trace"]:
        raise ValueError("--trace is needed")
    if parameters["longest"] < 1:
        raise ValueError(f"--longest {parameters['longest']}: must be at least 1")
    if not parameters["token_ms"] >= 0:
        raise ValueError(f"--token-ms {parameters['token_ms']}: must not be below 0")


def run_trace(load: answers.Load, longest: int, token_seconds: float) -> dict[str, Any]:
    """Every model and every rule on one load, which no model sees before it is asked."""
    lengths = np.array([answer.tokens for answer in load.answers], dtype=np.int64)
    if lengths.max() > longest:
        raise ValueError(f"--longest {longest}: an answer has {lengths.max()} tokens")
    bins = LengthBins(longest, PER_OCTAVE)
    edges = np.unique(np.concatenate([[0], cuts(lengths), [longest]]))
    models = {name: make(longest) for name, make in MODELS.items()}
    judges = {name: Judge(bins, edges) for name in models}
    rules = {name: make(bins) for name, make in RULES.items()}
    ledgers = {name: Ledger() for name in rules}
    nobody = Known(1)
    for event in load.events(token_seconds):
        answer = load.answers[event.index]
        if event.kind == "arrive":
            curves = {name: model.arrive(event.index, answer) for name, model in models.items()}
            for name, curve in curves.items():
                judges[name].note(curve, answer.tokens)
            mixed, general = (Forecast.of(bins, nobody, curves[n]) for n in (MIXED, SHORT))
            for name, rule in rules.items():
                ledgers[name].note(rule.reserve(mixed, general), answer.tokens)
        elif event.kind == "progress":
            for model in models.values():
                model.progress(event.index, event.tokens)
        else:
            for model in models.values():
                model.finish(event.index, answer)
            for rule in rules.values():
                rule.finish(answer.tokens)
    mixture = models[MIXED]
    assert isinstance(mixture, Mixed)
    return {
        "requests": len(lengths),
        "cuts": edges[1:-1].tolist(),
        "models": {name: judge.summary(load) for name, judge in judges.items()},
        "weights": [round(float(weight), 4) for weight in mixture.forecaster.weights],
        "reservations": {name: ledger.summary() for name, ledger in ledgers.items()}
        | {PAGED: paged(lengths.tolist())},
    }


def _run(args: argparse.Namespace) -> int:
    parameters = {name: getattr(args, name) for name in _PARAMETERS}
    output, expected = results.begin(args, BENCHMARK)
    if expected is not None:
        parameters = expected["parameters"]
    _validate(parameters)
    names = list(dict.fromkeys(parameters["trace"]))
    with results.resuming(results.journal_of(output, args.check), parameters) as journal:
        for name in names:
            if name not in journal.done:
                load = answers.load(name, parameters["seed"])
                found = run_trace(load, parameters["longest"], parameters["token_ms"] / 1e3)
                journal.add(name, [found, costs(load, parameters["longest"])])
            report.show(name, *journal.done[name])
        report.show_published()
        result = results.record(
            BENCHMARK,
            results.environment(parameters["seed"]),
            parameters,
            counts={name: journal.done[name][0] for name in names},
            timings={name: journal.done[name][1] for name in names},
        )
        results.save(output, result)
    return results.verdict(args.check, expected, result)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark, or check a result file: 1 if a count differs, 2 for bad input."""
    return exit_status(
        BENCHMARK,
        lambda: _run(args),
        bad_input=(InputError, ValueError),
        interrupted="the same command goes on behind the traces that are done",
    )
