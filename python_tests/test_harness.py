"""The engine as a model of lm-evaluation-harness: what it answers, and Engine.log_probs under it."""

import itertools
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from reference.model import ReferenceModel

from dllm_ext import ConfigError, GenerationConfig, InputError, UsageError

if os.environ.get("DLLM_REQUIRE_EVAL") != "1":
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (pip install lm-eval)")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from dllm_ext.harness import HarnessModel, stop_strings
from dllm_ext.tokenizer import cut


@pytest.fixture(scope="module")
def oracle(folder):
    return ReferenceModel.from_folder(folder, torch.float64)


@pytest.fixture(scope="module")
def model(folder):
    return HarnessModel(str(folder), dtype="float32", gen_length=12, block_length=6, num_transfer_tokens=1)


def request(kind, *arguments, doc_id=0):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0, metadata=("task", doc_id, 1))


def generate(*prompts, **kwargs):
    return [request("generate_until", p, kwargs, doc_id=i) for i, p in enumerate(prompts)]


def oracle_log_probs(oracle, tokens, hidden):
    canvas = [oracle.shape.mask_id if i in hidden else t for i, t in enumerate(tokens)]
    rows = torch.tensor([i - oracle.shape.shift for i in hidden])
    log_probs = torch.log_softmax(oracle.full_logits(canvas)[rows], dim=-1)
    return [log_probs[r, tokens[i]].item() for r, i in enumerate(hidden)]


# --- Engine.log_probs ---
def test_log_probs_are_the_oracle_s(engine, oracle):
    tokens = [(7 * i + 3) % 250 for i in range(30)]
    for hidden in ([4], [1, 2, 3], [5, 11, 29], list(range(1, 30))):
        [mine] = engine.log_probs([tokens], [hidden])
        assert mine == pytest.approx(oracle_log_probs(oracle, tokens, hidden), abs=2e-4)


def test_log_probs_of_several_sequences(engine):
    a, b = [5, 6, 7, 8], [9, 10, 11, 12, 13]
    both = engine.log_probs([a, b, a], [[1, 3], [2], []])
    assert both == [*engine.log_probs([a], [[1, 3]]), *engine.log_probs([b], [[2]]), []]


def test_log_probs_do_not_depend_on_hidden_tokens(engine):
    [[one]] = engine.log_probs([[5, 6, 7, 8, 9]], [[3]])
    both = engine.log_probs([[5, 6, 7, 8, 9], [5, 6, 7, 99, 9]], [[3], [3]])
    assert both[0] == [one] and both[1] != [one]


@pytest.mark.parametrize(
    ("sequences", "hidden", "message"),
    [
        ([[1, 2]], [], "1 sequences and 0 lists"),
        ([[1, 2]], [[2]], "position 2"),
        ([[1, 2]], [[-1]], "position -1"),
        ([[1, 2, 3]], [[1, 1]], "must ascend"),
        ([[1, 2, 3]], [[2, 1]], "must ascend"),
        ([[1, 10**6]], [[1]], "1000000"),
    ],
)
def test_log_probs_errors(engine, sequences, hidden, message):
    with pytest.raises(InputError, match=message):
        engine.log_probs(sequences, hidden)


def test_log_probs_of_the_first_token_where_nothing_tells_of_it(engine):
    if engine.spec.logit_shift:
        with pytest.raises(InputError, match="between 1 and 1"):
            engine.log_probs([[1, 2]], [[0]])
    else:
        assert engine.log_probs([[1, 2]], [[0]])[0][0] < 0


def test_log_probs_within_on_step(engine):
    with pytest.raises(UsageError, match=r"log_probs\(\) was called from within on_step"):
        engine.generate([1, 2, 3], gen_length=4, on_step=lambda event: engine.log_probs([[1, 2]], [[1]]))
    assert engine.log_probs([[1, 2]], [[1]])


# --- generate_until ---
def test_generate_until_is_engine_generate(model, engine):
    prompts = ["Question: how many?", "x", "A longer prompt, with several words in it."]
    texts = model.generate_until(generate(*prompts, until=[]), disable_tqdm=True)
    config = GenerationConfig(gen_length=12, block_length=6, num_transfer_tokens=1)
    results = engine.generate(prompts, config, chat=False)
    assert texts == [r.text for r in results]
    answers = [answer for _, answer in model.answered[-3:]]
    assert [a["token_ids"] for a in answers] == [r.token_ids for r in results]
    assert [a["nfe"] for a in answers] == [r.nfe for r in results]


def test_batches_change_nothing(folder, model):
    requests = generate("one", "two two", "three three three", "four", until=[])
    batched = HarnessModel(
        str(folder), dtype="float32", gen_length=12, block_length=6, num_transfer_tokens=1, batch_size=3
    )
    assert batched.generate_until(requests, True) == model.generate_until(requests, True)


def test_chat_prompts_are_those_of_the_engine(folder, engine):
    chat = HarnessModel(str(folder), dtype="float32", gen_length=8)
    messages = [
        {"role": "user", "content": "Hello there "},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Again"},
    ]
    text = chat.apply_chat_template(messages)
    assert chat.encode(text) == engine.encode(messages)
    assert chat.chat_template(True) == engine.tokenizer.chat_template


def test_stop_strings(model):
    [text] = model.generate_until(generate("Question:", until=[]), True)
    assert len(text) > 4
    [short] = model.generate_until(generate("Question:", until=["never there", text[2:4]]), True)
    assert short == text[: text.index(text[2:4])]
    assert stop_strings({"until": "a"}) == ["a"] and stop_strings({}) == []
    assert cut("abcabc", ["c", "b"]) == "a" and cut("abc", ["", "x"]) == "abc"


def test_the_task_s_length_counts_where_none_is_given(folder):
    model = HarnessModel(str(folder), dtype="float32")
    model.generate_until(generate("a", until=[], max_gen_toks=7), True)
    assert len(model.answered[0][1]["token_ids"]) == 7
    given = HarnessModel(str(folder), dtype="float32", gen_length=5)
    given.generate_until(generate("a", until=[], max_gen_toks=7), True)
    assert len(given.answered[0][1]["token_ids"]) == 5


def test_what_is_known_is_not_computed_again(folder):
    model = HarnessModel(str(folder), dtype="float32", gen_length=4)
    seen = []
    model.on_answer = lambda key, answer: seen.append(key)
    first = model.generate_until(generate("a", "b", until=[]), True)
    again = HarnessModel(str(folder), dtype="float32", gen_length=4)
    again.answers = dict(model.answers)
    again.on_answer = lambda key, answer: seen.append(key)
    assert again.generate_until(generate("b", "c", "a", until=[]), True)[::2] == first[::-1]
    assert len(seen) == 3 and len(set(seen)) == 3


def test_repeats_have_seeds_of_their_own(folder, engine):
    model = HarnessModel(str(folder), dtype="float32", gen_length=8, temperature=1.0, num_transfer_tokens=1, seed=5)
    one = generate("a", until=[])[0]
    model.generate_until([one, one, one], True)
    ids = [answer["token_ids"] for _, answer in model.answered]
    fields = {"gen_length": 8, "temperature": 1.0, "num_transfer_tokens": 1}
    assert ids == [engine.generate("a", chat=False, seed=5 + i, **fields).token_ids for i in range(3)]
    assert len({tuple(i) for i in ids}) == 3


def test_a_prompt_that_is_too_long_loses_its_middle(tmp_path):
    import conftest
    import models

    folder = models.write_model(tmp_path / "short", "llada", max_sequence_length=32)
    conftest.write_tokenizer(folder, "llada")
    model = HarnessModel(str(folder), dtype="float32", gen_length=8)
    text = "0123456789" * 5
    model.generate_until(generate(text, until=[]), True)
    [(_, answer)] = model.answered
    assert answer["prompt_tokens"] == 24
    expected = model.engine.generate(text[:12] + text[-12:], chat=False, gen_length=8)
    assert answer["token_ids"] == expected.token_ids


# --- loglikelihood ---
def exact_log_likelihood(oracle, given, asked):
    """The estimator's expectation, over all numbers of hidden tokens and all sets of them."""
    length = len(asked)
    total = 0.0
    for n in range(1, length + 1):
        sets = list(itertools.combinations(range(length), n))
        for chosen in sets:
            log_probs = oracle_log_probs(oracle, given + asked, [len(given) + i for i in chosen])
            total += length / n * sum(log_probs) / len(sets) / length
    return total


def test_loglikelihood_is_the_oracle_s_within_its_error(folder, oracle):
    context, continuation = "The answer is", " four"
    model = HarnessModel(str(folder), dtype="float32", mc_num=64, is_check_greedy=False)
    given, asked = model.encode_pair(context, continuation)
    assert len(asked) == 5
    exact = exact_log_likelihood(oracle, given, asked)
    estimates = []
    for seed in range(40):
        seeded = model.log_likelihood(given, asked, f"seed {seed}")[0]
        estimates.append(seeded)
    mean = sum(estimates) / len(estimates)
    deviation = math.sqrt(sum((e - mean) ** 2 for e in estimates) / (len(estimates) - 1))
    assert 0 < deviation < abs(exact)
    assert abs(mean - exact) < 4 * deviation / math.sqrt(len(estimates))
    [(one, greedy)] = model.loglikelihood([request("loglikelihood", context, continuation)], True)
    assert abs(one - exact) < 5 * deviation and greedy is False


def test_loglikelihood_of_one_token_is_exact(model, oracle):
    given, asked = model.encode_pair("abc", "d")
    assert len(asked) == 1
    value, forwards = model.log_likelihood(given, asked, "")
    assert forwards == 1
    assert value == pytest.approx(oracle_log_probs(oracle, given + asked, [len(given)])[0], abs=2e-4)


def test_greedy_continuations_are_found(folder, engine):
    model = HarnessModel(str(folder), dtype="float32", mc_num=4)
    prompt = next(  # whose continuation is text that encodes to the same tokens, so not every random one
        text
        for text in map(str, range(100, 400))
        if (ids := greedy(engine, text)) and engine.encode(text + engine.tokenizer.decode(ids), chat=False)[3:] == ids
    )
    continuation = engine.tokenizer.decode(greedy(engine, prompt))
    right, wrong = request("loglikelihood", prompt, continuation), request("loglikelihood", prompt, "\u00fc!")
    assert [g for _, g in model.loglikelihood([right, wrong], True)] == [True, False]


def greedy(engine, text):
    ids = engine.generate(text, GenerationConfig.reference(gen_length=2), chat=False).token_ids
    return ids if all(32 < i < 120 for i in ids) else None


def test_loglikelihood_is_reproducible(folder):
    requests = [request("loglikelihood", "ab", " cd ef"), request("loglikelihood", "", "gh")]
    one, two = (HarnessModel(str(folder), dtype="float32", mc_num=8, seed=3) for _ in range(2))
    assert one.loglikelihood(requests, True) == two.loglikelihood(requests[::-1], True)[::-1]
    other = HarnessModel(str(folder), dtype="float32", mc_num=8, seed=4)
    assert other.loglikelihood(requests, True) != one.loglikelihood(requests, True)


def test_spaces_at_the_end_of_a_context_belong_to_the_continuation(model):
    assert model.encode_pair("a b  ", "c") == model.encode_pair("a b", "  c")


def test_an_empty_continuation_is_certain(model):
    assert model.loglikelihood([request("loglikelihood", "abc", "")], True) == [(0.0, True)]


def test_rolling_is_refused(model):
    with pytest.raises(InputError, match="loglikelihood_rolling is not available"):
        model.loglikelihood_rolling([])


# --- in the harness ---
def test_the_name_is_registered():
    assert get_model("dllm_ext") is HarnessModel


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size = 0"),
        ({"batch_size": "auto"}, "batch_size = 'auto'"),
        ({"mc_num": 0}, "mc_num = 0"),
        ({"nonsense": 1}, "nonsense"),
        ({"kp": 3}, "kp is not allowed without cache"),
        ({"add_bos_token": "yes"}, "add_bos_token = 'yes'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        HarnessModel("mini-llada", **arguments)


def test_cache_settings_by_the_names_of_the_command_line(folder):
    model = HarnessModel.create_from_arg_string(f"pretrained={folder},cache=d2,current_k=5,d2_sigma=3.0,dtype=float32")
    assert (model.config.cache.current_k, model.config.cache.sigma) == (5, 3.0)


def test_the_harness_s_own_command(tmp_path):
    """`dllm lm-eval run --model dllm_ext`, on a task file of two questions; a choice and a generation."""
    questions = ("Tom has 3 apples. He buys 4 more. How many apples does Tom have now?", "Ana has 2 pens.")
    expected = "So "  # "So he buys 4: ..." up to the stop string
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"q": q}) for q in questions))
    common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}
test_split: test
doc_to_text: "{{{{q}}}}"
"""
    (tmp_path / "choice.yaml").write_text(
        "task: two_choices\noutput_type: multiple_choice\ndoc_to_target: 0\ndoc_to_choice: [' 7', ' Tom']\n"
        "metric_list: [{metric: acc}]\n" + common
    )
    (tmp_path / "text.yaml").write_text(
        "task: two_texts\noutput_type: generate_until\ndoc_to_target: '" + expected + "'\n"
        "generation_kwargs: {until: ['he']}\n"
        "metric_list: [{metric: exact_match}]\n" + common
    )
    command = [sys.executable, "-m", "dllm_ext", "lm-eval", "run", "--model", "dllm_ext"]
    command += ["--model_args", "pretrained=mini-llada,gen_length=16,block_length=16,threshold=0.9,mc_num=4"]
    command += ["--tasks", "two_choices,two_texts", "--include_path", str(tmp_path)]
    command += ["--apply_chat_template", "--output_path", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    [file] = (tmp_path / "out").rglob("results*.json")
    found = json.loads(file.read_text())["results"]
    model = HarnessModel("mini-llada", gen_length=16, block_length=16, threshold=0.9, mc_num=4)
    prompts = [model.apply_chat_template([{"role": "user", "content": q}]) for q in questions]
    firsts = 0
    for prompt in prompts:
        pairs = [request("loglikelihood", prompt, choice) for choice in (" 7", " Tom")]
        (seven, _), (tom, _) = model.loglikelihood(pairs, True)
        firsts += seven > tom
    texts = model.generate_until(generate(*prompts, until=["he"]), True)
    assert found["two_choices"]["acc,none"] == firsts / 2
    assert found["two_texts"]["exact_match,none"] == texts.count(expected) / 2 > 0
