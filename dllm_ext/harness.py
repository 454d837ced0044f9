"""This engine as a model of EleutherAI's lm-evaluation-harness, under the name "dllm_ext".

    dllm lm-eval run --model dllm_ext --model_args pretrained=mini-llada,gen_length=64,threshold=0.9 --tasks ...

That is the harness's own program `lm_eval`, with the name registered first; any program that imports this module can
give the name. benchmarks/eval.py builds on it.

Requests are shared out among the processes of `accelerate launch` or `torchrun`: each answers its share and gets the
answers of all. So to the harness every process is the only one, and no answer depends on how many there are.
"""

import datetime
import hashlib
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from .checks import check_bool, check_int
from .config import GenerationConfig, flat_config
from .engine import Engine
from .errors import ConfigError, InputError, UsageError
from .frequencies import TokenFrequencies
from .tokenizer import cut


@dataclass(frozen=True)
class Processes:
    """The processes of a run, of which this is number `rank`. One, where no launcher started several."""

    rank: int = 0
    count: int = 1

    @classmethod
    def connect(cls) -> "Processes":
        """Those that the launcher's environment speaks of, connected by Accelerate."""
        expected = int(os.environ.get("WORLD_SIZE", "1"))
        if expected == 1:
            return cls()
        from accelerate import PartialState

        # One process may have far more to do than another; none waits in vain, since the launcher ends all or none.
        # Without being told, Accelerate connects no processes that have no GPU.
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=datetime.timedelta(weeks=52))
        if state.num_processes != expected:
            raise UsageError(f"Accelerate connected {state.num_processes} of {expected} processes")
        return cls(state.process_index, state.num_processes)

    def gather(self, values: list) -> list:
        """The lists of all processes one after the other, in every process."""
        if self.count == 1:
            return values
        from accelerate.utils import gather_object

        return gather_object(values)


@register_model("dllm_ext")
class HarnessModel(LM):
    """An Engine behind the harness's interface: generate_until and loglikelihood.

    An answer is a dict of plain values: of generate_until `text` (not cut at stop strings), `token_ids`, and what it
    cost; of loglikelihood `log_likelihood` and `is_greedy`. Every answer has a key, the hash of all that is asked.

    Attributes:
        engine: The Engine.
        config: How it decodes.
        processes: The processes that share the work.
        answers: Key -> answer, of all that are known. What is put here first is not computed again.
        on_answer: Called with key and answer after each one that this process computes.
        answered: (request, answer) of every request so far, in the harness's order.
    """

    def __init__(
        self,
        pretrained: str = "mini-llada",
        *,
        device: str | None = None,
        dtype: str = "auto",
        quantization: str | None = None,
        revision: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        add_bos_token: bool = False,
        mc_num: int = 128,
        is_check_greedy: bool = True,
        **fields,
    ):
        """Load a model. The first arguments are those of Engine.from_pretrained.

        batch_size: sequences that run at a time. (max_batch_size: the harness gives it; not used.)
        add_bos_token: put the tokenizer's bos before prompts that are no chats, as Dream's base model was evaluated.
        mc_num: samples of the Monte-Carlo estimate of a log-likelihood, at least 1.
        is_check_greedy: find out whether a continuation is what the model generates, one token per step. Off, the
            answer is always no; few metrics ask.
        fields: those of GenerationConfig, and a cache's, as `dllm generate --help` has them. Without gen_length, a
            task's max_gen_toks counts; a task's own temperature does not.
        """
        super().__init__()
        self.processes = Processes.connect()  # also chooses this process's GPU
        frequencies = fields.pop("token_frequencies", None)
        self.config = flat_config(fields)
        self.batch_size = check_int("batch_size", int(batch_size) if str(batch_size).isdigit() else batch_size)
        self.mc_num = check_int("mc_num", mc_num)
        for name in ("batch_size", "mc_num"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)} is not allowed: it must be at least 1")
        self.is_check_greedy = check_bool("is_check_greedy", is_check_greedy)
        add_bos_token = check_bool("add_bos_token", add_bos_token)
        device = "auto" if device in (None, "cuda:0") else device  # the harness's command says cuda:0 by default
        self.engine = Engine.from_pretrained(pretrained, device, dtype, quantization, revision)
        if frequencies is not None:
            frequencies = TokenFrequencies.load(frequencies, self.engine.spec.vocab_size)
            self.config = replace(self.config, token_frequencies=frequencies)
        self.answers: dict[str, dict] = {}
        self.on_answer: Callable[[str, dict], None] = lambda key, answer: None
        self.answered: list[tuple[Instance, dict]] = []
        self._length_is_given = "gen_length" in fields
        self._bos = self.engine.tokenizer.bos if add_bos_token else ""
        self._is_chat = False

    # --- what the harness asks of a model ---

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The generated text of each request, up to the first of its stop strings."""
        answers = self.answer(requests, disable_tqdm)
        return [cut(a["text"], stop_strings(r.args[1])) for a, r in zip(answers, requests, strict=True)]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(estimate of log p(continuation | context), whether it is what the model generates) of each request."""
        return [(a["log_likelihood"], a["is_greedy"]) for a in self.answer(requests, disable_tqdm)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Not available: InputError."""
        raise InputError("loglikelihood_rolling is not available: a masked diffusion model has no order of its own")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text. From then on, every prompt is taken to be such a text."""
        self._is_chat = True
        return self.engine.tokenizer.render_chat(chat_history, add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness's files."""
        return str(self.engine.folder).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template in use, for the harness's records."""
        return self.engine.tokenizer.chat_template if chat_template else None

    # --- how it answers ---

    def answer(self, requests: list[Instance], disable_tqdm: bool = False) -> list[dict]:
        """The answer to each request, in order: known ones as they are, the rest shared out among the processes."""
        jobs = [_Job(key, occurrence, request) for key, occurrence, request in self._keyed(requests)]
        waiting = [job for job in jobs if job.key not in self.answers]
        mine = waiting[self.processes.rank :: self.processes.count]
        fresh, tokens, seconds = [], 0, 0.0
        known = f", {len(jobs) - len(waiting)} known" if len(waiting) < len(jobs) else ""
        of = f" (1 of {self.processes.count} processes)" if self.processes.count > 1 else ""
        hidden = disable_tqdm or self.processes.rank > 0
        with tqdm(total=len(mine), desc=f"answering{of}{known}", unit="sample", disable=hidden) as bar:
            for job, answer in self._compute(mine):
                self.on_answer(job.key, answer)
                fresh.append((job.key, answer))
                tokens, seconds = tokens + answer.get("tokens", 0), seconds + answer["seconds"]
                bar.set_postfix_str(f"{tokens / seconds:.1f} tokens/s" if tokens and seconds else "", refresh=False)
                bar.update()
        self.answers.update(self.processes.gather(fresh))
        answers = [self.answers[job.key] for job in jobs]
        self.answered += zip(requests, answers, strict=True)
        return answers

    def _keyed(self, requests) -> Iterator[tuple[str, int, Instance]]:
        """(key, occurrence, request) of each. One that comes again, as for pass@k, has another occurrence, and seed."""
        seen = Counter()
        for request in requests:
            asked = [request.request_type, self._is_chat, request.args[0]]
            asked.append(self._gen_length(request) if request.request_type == "generate_until" else request.args[1])
            text = json.dumps(asked)
            key = hashlib.sha256(f"{seen[text]} {text}".encode()).hexdigest()[:32]
            yield key, seen[text], request
            seen[text] += 1

    def _gen_length(self, request):
        if self._length_is_given:
            return self.config.gen_length
        return request.args[1].get("max_gen_toks", self.config.gen_length)

    def _compute(self, jobs):
        """(job, answer) of each, as they end."""
        for (kind, occurrence, length), alike in itertools.groupby(jobs, key=self._settings_of):
            if kind == "loglikelihood":
                for job in alike:
                    yield job, self._score(job.key, *job.request.args)
                continue
            config = replace(self.config, gen_length=length, seed=(self.config.seed + occurrence) % 2**64)
            while batch := list(itertools.islice(alike, self.batch_size)):
                prompts = [self._fitting(self.encode(job.request.args[0]), length) for job in batch]
                results = self.engine.generate(prompts, config, batch_size=self.batch_size)
                for job, prompt, result in zip(batch, prompts, results, strict=True):
                    yield job, self._record(result, len(prompt))

    def _fitting(self, prompt, gen_length):
        """A prompt that is too long for the model, without its middle: both ends say what is asked (as LongBench)."""
        room = self.engine.spec.max_positions - gen_length
        if len(prompt) <= room or room < 2:
            return prompt  # in the second case the engine says what is wrong
        return prompt[: room - room // 2] + prompt[len(prompt) - room // 2 :]

    def _settings_of(self, job):
        kind = job.request.request_type
        return (kind, job.occurrence, self._gen_length(job.request)) if kind == "generate_until" else (kind, 0, 0)

    def _record(self, result, prompt_tokens):
        s = result.stats
        return {
            "text": result.text,
            "token_ids": result.token_ids,
            "prompt_tokens": prompt_tokens,
            "tokens": s.tokens,
            "nfe": s.nfe,
            "layer_rows": sum(s.layer_rows) / self.engine.spec.n_layers,
            "logit_rows": sum(s.logit_rows),
            "seconds": s.seconds_total,
            "seconds_first_block": s.time_to_first_block,
        }

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, as generate_until and loglikelihood take it."""
        return self.engine.tokenizer.encode(self._bos + text, add_special_tokens=not self._is_chat)

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of both. Spaces that end the context go to the continuation, where tokenizers expect them."""
        bare = context.rstrip(" ")
        whole = self.encode(context + continuation)
        given = self.encode(bare) if bare else []
        if not given and self.engine.spec.logit_shift:  # the first token needs one before it to be read from
            given = [self.engine.spec.eos_id]
            return given, whole
        return given, whole[len(given) :]

    def _score(self, key, context, continuation):
        begin = time.perf_counter()
        given, asked = self.encode_pair(context, continuation)
        log_likelihood, forwards = self.log_likelihood(given, asked, key)
        is_greedy = False
        if self.is_check_greedy and asked:
            config = GenerationConfig.reference(gen_length=len(asked))
            [result] = self.engine.generate([given], config)
            is_greedy = result.token_ids == asked
            forwards += result.nfe
        seconds = time.perf_counter() - begin
        return {
            "log_likelihood": log_likelihood,
            "is_greedy": is_greedy or not asked,
            "prompt_tokens": len(given),
            "nfe": forwards,
            "seconds": seconds,
        }

    def log_likelihood(self, given: list[int], asked: list[int], key: str) -> tuple[float, int]:
        """(Monte-Carlo estimate of log p(asked | given), forwards it took).

        LLaDA's estimator (arXiv 2502.09992, eq. 6; ML-GSAI/LLaDA, get_log_likelihood.py): hide n of the L asked tokens,
        drawn at random, n uniform in 1..L; the estimate is the mean of L/n times the sum of the hidden tokens' log
        probabilities. The mc_num values of n are spread evenly over 1..L from a random start, and a mask that is drawn
        several times is evaluated once. key and the seed decide the draws.
        """
        length = len(asked)
        if not length:
            return 0.0, 0
        bits = hashlib.sha256(f"{self.config.seed} {key}".encode()).digest()
        random = numpy.random.Generator(numpy.random.Philox(key=int.from_bytes(bits[:16], "little")))
        start = int(random.integers(length))
        counts = [(start + i * length // self.mc_num) % length + 1 for i in range(self.mc_num)]
        masks = Counter(tuple(sorted(random.choice(length, n, replace=False).tolist())) for n in counts)
        total = 0.0
        for mask, times in masks.items():
            [log_probs] = self.engine.log_probs([given + asked], [[len(given) + i for i in mask]])
            total += times * length / len(mask) * sum(log_probs)
        return total / self.mc_num, len(masks)


@dataclass(frozen=True)
class _Job:
    key: str
    occurrence: int
    request: Instance


def stop_strings(gen_kwargs: dict) -> list[str]:
    """A request's `until` as a list."""
    until = gen_kwargs.get("until") or []
    return [until] if isinstance(until, str) else list(until)
