"""What eval.py is asked to do: overrides checked against configs/, and what they leave open filled in for the task."""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from dllm_ext.checks import check_bool, check_int
from dllm_ext.errors import ConfigError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
GROUPS = ("cache", "generation", "model")
MISSPELT = {"cache.rollour_p": "cache.rollout_p"}  # so in published commands
NO_INFLUENCE = ("attn_implementation", "execute_code", "hydra", "out")  # on answers and their times

ALGORITHMS = {"maskgit_plus": "low_confidence"}  # the d2Cache harness's name -> GenerationConfig.remasking
DIRECT = (  # fields of GenerationConfig that have the same name here
    *("gen_length", "block_length", "num_transfer_tokens", "threshold", "factor", "gamma", "kl_threshold"),
    *("kl_history_length", "steps", "schedule", "temperature", "top_p", "top_k", "alg_temp", "sigma", "autoregressive"),
    *("clip_alpha", "position_decay", "cfg_scale", "reference_quirks"),
)

log = logging.getLogger(__name__)


def fingerprint(config: DictConfig, *, of_one_answer: bool = False) -> str:
    """A short hash of all settings that answers or their times depend on.

    of_one_answer: that each answer depends on, so not how many there are.
    """
    values = OmegaConf.to_container(config, resolve=False)
    values = {name: value for name, value in values.items() if name not in NO_INFLUENCE}
    values["model"]["path"] = OmegaConf.select(config, "model.path", throw_on_missing=False)
    if of_one_answer:
        del values["dataset"]["size"]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


OmegaConf.register_new_resolver("fingerprint", lambda _root_: fingerprint(_root_), replace=True)


def table() -> dict:
    """configs/tasks.yaml."""
    return yaml.safe_load((CONFIGS / "tasks.yaml").read_text())


def checked_overrides(arguments: list[str]) -> list[str]:
    """Command-line arguments for Hydra. ConfigError for a name that does not exist, which lists those that do.

    Options such as --cfg, and Hydra's own +NAME=VALUE and ~NAME, go through as they are.
    """
    out = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        name, is_assignment, value = argument.partition("=")
        of_option = before.startswith("-") and "=" not in before + argument  # --cfg job
        if argument[:1] in ("-", "+", "~") or name.startswith("hydra.") or of_option:
            out.append(argument)
            continue
        if not is_assignment or not value:
            raise ConfigError(f"{argument!r} has no value: it must be NAME=VALUE")
        if name in MISSPELT:
            log.warning("%s is taken for %s", name, MISSPELT[name])
            name = MISSPELT[name]
        if name in GROUPS:
            _check_choice(name, value)
        out.append(f"{name}={value}")
    plain = [a for a in out if "=" in a and a[0] not in "-+~" and not a.startswith("hydra.")]
    try:
        with initialize_config_dir(str(CONFIGS), version_base=None):
            config = compose("eval", overrides=[a for a in plain if a.partition("=")[0] in GROUPS])
            for name in (a.partition("=")[0] for a in plain):
                if name not in GROUPS:
                    _check_name(config, name)
            if plain == out:  # else Hydra is asked for something else, such as --cfg, or told more
                _check_missing(compose("eval", overrides=plain))
    except HydraException as e:  # its grammar gives a meaning to = ( ) [ ] { } , in a value that has no quotes
        raise ConfigError(f"{e} (special characters need quotes: 'NAME=\"VALUE\"')") from e
    return out


def _check_choice(group, value):
    there = sorted(path.stem for path in (CONFIGS / group).glob("*.yaml") if path.stem != "common")
    if value not in there:
        raise ConfigError(f"{group} = {value!r} does not exist; there are: {', '.join(there)}")


def _check_name(config, name):
    node, done = config, []
    for part in name.split("."):
        if not isinstance(node, DictConfig) or part not in list(node):  # `in node` denies missing values
            where = f"in {'.'.join(done)}" if done else "at the top"
            there = ", ".join(node) if isinstance(node, DictConfig) else "nothing"
            raise ConfigError(f"{name} does not exist; {where} there is: {there}")
        node = node._get_node(part)  # a missing value or null is a node, too
        done.append(part)
    if isinstance(node, DictConfig):
        raise ConfigError(f"{name} is no setting but a group of some: {', '.join(f'{name}.{part}' for part in node)}")


@dataclass(frozen=True)
class Settings:
    """One evaluation, with nothing left to decide."""

    dataset: str
    task: str  # its name in the harness
    metric: str  # the harness's name of what is called accuracy
    is_code: bool
    model: dict  # arguments of HarnessModel but for those of generation
    instruct: bool
    fields: dict  # of flat_config: how to decode


def resolve(config: DictConfig) -> Settings:
    """Fill in what depends on the task, the model and the cache. ConfigError for what is missing or not allowed."""
    _check_missing(config)
    _check_values(config)
    tasks = table()
    name = config.dataset.name
    if name not in tasks["tasks"]:
        raise ConfigError(f"dataset.name = {name!r} does not exist; there are: {', '.join(tasks['tasks'])}")
    task = tasks["tasks"][name]
    model = OmegaConf.to_container(config.model, resolve=True)
    arguments = {key: model[key] for key in ("device", "dtype", "quantization", "revision", "add_bos_token")}
    return Settings(
        dataset=name,
        task=task["task"].rpartition("/")[2],
        metric=task["metric"],
        is_code=task.get("code", False),
        model={"pretrained": model["path"], "batch_size": config.batch_size, "mc_num": config.mc_num, **arguments},
        instruct=model["instruct"],
        fields=_fields(config, tasks, task),
    )


def _check_missing(config):
    if OmegaConf.is_missing(config.dataset, "name"):
        raise ConfigError(f"dataset.name=NAME is missing; there are: {', '.join(table()['tasks'])}")
    if config.generation.name == "pc_sampler" and config.generation.token_frequencies is None:
        raise ConfigError("generation.token_frequencies=FILE is missing: pc_sampler weighs by it")


def _check_values(config):
    """What nobody after this checks. Hydra reads `no` and `off` as text, and any text would count as true."""
    for name in ("execute_code", "model.instruct", "cache.use_dual"):
        if (value := OmegaConf.select(config, name)) is not None:
            check_bool(name, value)
    for name, least in (("dataset.size", 1), ("dataset.n_shot", 0)):
        value = OmegaConf.select(config, name)
        if value is not None and check_int(name, value) < least:
            raise ConfigError(f"{name} = {value} is not allowed: it must be at least {least}")


def _fields(config, tasks, task):
    g = OmegaConf.to_container(config.generation, resolve=True)
    fields = {name: g[name] for name in DIRECT if g[name] is not None}
    fields["seed"] = config.seed
    fields["stop_at_eos"] = g["stop_until_eos"]
    fields["remasking"] = ALGORITHMS.get(g["alg"], g["alg"])
    if g["token_frequencies"] is not None:
        fields["token_frequencies"] = g["token_frequencies"]
    fields.setdefault("gen_length", task["gen_length"])
    in_blocks = config.cache.name in ("prefix", "dual") or (config.model.instruct and config.cache.name != "d2cache")
    blocks = min(tasks["block_length"], fields["gen_length"]) if in_blocks else fields["gen_length"]
    fields.setdefault("block_length", blocks)
    if config.model.name.startswith("dream"):
        for name, value in tasks["dream"].items():
            fields.setdefault(name, value)
    return fields | _cache_fields(config, tasks["dllm"])


def _cache_fields(config, dllm):
    cache = OmegaConf.to_container(config.cache, resolve=True)
    name = cache.pop("name")
    if name == "prefix":
        return {"cache": "dual" if cache["use_dual"] else "prefix"}
    if name == "d2cache":
        return {"cache": "d2", "d2_sigma": cache.pop("sigma"), **cache}
    if name == "dllm":
        model = {"llada-1.5": "llada-inst"}.get(config.model.name, config.model.name)
        kp, kr = dllm.get(config.dataset.name, {}).get(model, dllm["other"])
        defaults = {"kp": kp, "kr": kr}
        return {"cache": "dllm"} | defaults | {key: value for key, value in cache.items() if value is not None}
    return {"cache": name}
