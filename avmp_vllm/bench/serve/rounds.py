"""What one round of requests came to, by the definitions of ``vllm bench serve``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from avmp_vllm.demo.replay import Replay

#: An answer: text, or token ids; None where there is none.
Text = str | tuple[int, ...] | None


class Timed(NamedTuple):
    """One request that was answered.

    Attributes:
        prompt_tokens, answer_tokens: As counted by whoever drove the server.
        ttft_s: Seconds to the first token.
        gaps_s: Seconds between the pieces that followed.
        latency_s: Seconds to the last one.
    """

    prompt_tokens: int
    answer_tokens: int
    ttft_s: float
    gaps_s: Sequence[float]
    latency_s: float

    @property
    def tpot_s(self) -> float:
        """Seconds a token after the first; 0 for an answer of one token."""
        more = self.answer_tokens - 1
        return (self.latency_s - self.ttft_s) / more if more > 0 else 0.0


class Goal(NamedTuple):
    """A latency goal: a request is good if it meets both (ms)."""

    ttft_ms: float
    tpot_ms: float

    def met_by(self, request: Timed) -> bool:
        """Whether a request is good."""
        return 1e3 * request.ttft_s <= self.ttft_ms and 1e3 * request.tpot_s <= self.tpot_ms


@dataclass
class Round:
    """All requests of one round.

    Attributes:
        seconds: From the first request to the last answer.
        failed: Requests without an answer; ``errors`` says why.
        texts: What was answered, request by request, None for no answer; empty if unknown.
    """

    seconds: float
    answered: list[Timed]
    failed: int = 0
    errors: list[str] = field(default_factory=list)
    texts: list[Text] = field(default_factory=list)

    @classmethod
    def from_vllm(cls, result: Mapping[str, Any]) -> Round:
        """Read what ``vllm bench serve --save-detailed`` gives.

        Raises:
            ValueError: It lacks a field, or its lists differ in length.
        """
        names = ("input_lens", "output_lens", "ttfts", "itls", "latencies", "errors")
        missing = [name for name in ("duration", *names) if name not in result]
        if missing:
            raise ValueError(f"vllm bench serve gave no {', '.join(missing)}")
        if len({len(result[name]) for name in names}) != 1:
            raise ValueError("vllm bench serve gave lists of different lengths")
        found = cls(result["duration"], [])
        texts = result.get("generated_texts", [])
        found.texts = [
            None if error else text
            for text, error in zip(texts, result["errors"] if texts else [], strict=True)
        ]
        for *values, error in zip(*(result[name] for name in names), strict=True):
            if error:
                found.errors.append(str(error).strip().splitlines()[-1])
            else:
                found.answered.append(Timed(*values))
        found.failed = len(found.errors)
        return found

    @classmethod
    def from_replay(cls, replay: Replay) -> Round:
        """Read what the project's own client measured."""
        found = cls(replay.seconds, [])
        for answer in replay.answers:
            failed = answer.error is not None or answer.ttft_s is None
            found.texts.append(None if failed else tuple(answer.token_ids) or answer.text)
            if answer.error is not None or answer.ttft_s is None:
                found.errors.append(answer.error or "no text")
                continue
            found.answered.append(
                Timed(
                    answer.prompt_tokens,
                    answer.completion_tokens,
                    answer.ttft_s,
                    answer.gaps_s,
                    answer.ttft_s + sum(answer.gaps_s),
                )
            )
        found.failed = len(found.errors)
        return found

    def equal_to(self, other: Round) -> int | None:
        """Requests that both answered, and alike; None where the answers are not known.

        Raises:
            ValueError: The other round had another number of requests.
        """
        if not self.texts or not other.texts:
            return None
        pairs = zip(self.texts, other.texts, strict=True)
        return sum(ours is not None and ours == theirs for ours, theirs in pairs)

    def counts(self) -> dict[str, int]:
        """What does not depend on a clock."""
        return {
            "answered": len(self.answered),
            "failed": self.failed,
            "prompt_tokens": sum(request.prompt_tokens for request in self.answered),
            "answer_tokens": sum(request.answer_tokens for request in self.answered),
        }

    def figures(self, goal: Goal | None) -> dict[str, float]:
        """Throughput (answer tokens/s), goodput (good requests/s), latencies (ms)."""
        firsts = [1e3 * request.ttft_s for request in self.answered] or [0.0]
        gaps = [1e3 * gap for request in self.answered for gap in request.gaps_s] or [0.0]
        tpots = [1e3 * r.tpot_s for r in self.answered if r.answer_tokens > 1] or [0.0]
        good = sum(goal.met_by(request) for request in self.answered) if goal else 0
        return {
            "throughput": sum(r.answer_tokens for r in self.answered) / self.seconds,
            "goodput": good / self.seconds,
            "ttft_p50_ms": float(np.median(firsts)),
            "ttft_p90_ms": float(np.percentile(firsts, 90)),
            "ttft_p99_ms": float(np.percentile(firsts, 99)),
            "itl_p50_ms": float(np.median(gaps)),
            "itl_p99_ms": float(np.percentile(gaps, 99)),
            "tpot_p50_ms": float(np.median(tpots)),
        }
