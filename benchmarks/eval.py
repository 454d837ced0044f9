"""Quality and speed of a model on a task, with any cache and any decoder.

    python eval.py dataset.name=mini-gsm model=mini-llada cache=prefix generation.threshold=0.9
    accelerate launch --num_machines 1 --num_processes 4 eval.py dataset.name=humaneval model=llada-base cache=prefix

Settings are NAME=VALUE, all of them listed in configs/eval.yaml and the folders beside it; data sets, and what each
asks of a generation, in configs/tasks.yaml. Problems are shared out among the processes; every answer is written to the
folder `out` as it is there, and the same command goes on where it was stopped. In the end that folder holds

    answers-RANK.jsonl  what each process computed
    samples.jsonl       every problem with prompt, answer, cost and scores
    results.json        accuracy, costs, settings, versions

docs/evaluation.md has examples, and how to work without a network.
"""

import logging
import sys
from contextlib import closing
from pathlib import Path

import hydra
from evaluation import journal, results, sandbox
from evaluation.settings import CONFIGS, Settings, checked_overrides, fingerprint, resolve
from evaluation.tasks import load, task_manager
from lm_eval.evaluator import simple_evaluate
from omegaconf import DictConfig, OmegaConf

from dllm_ext.errors import CheckpointError, ConfigError, DLLMError
from dllm_ext.harness import HarnessModel


class ShareDone(Exception):
    """A process that is not the first has done its share: the first one scores."""


class EvaluatedModel(HarnessModel):
    """A HarnessModel whose answers are kept in a folder."""

    def __init__(self, folder: Path, settings: str, **arguments):
        """settings: a name for all that an answer depends on. arguments: those of HarnessModel."""
        super().__init__(**arguments)
        known = self.processes.gather(list(journal.read(folder, settings).items()))  # before any process writes
        self.answers.update(known)
        self.known = len(self.answers)
        self.journal = journal.Journal(folder, self.processes.rank, settings)
        self.on_answer = self.journal.add

    def answer(self, requests, disable_tqdm=False):
        """As HarnessModel; ShareDone in every process but the first."""
        answers = super().answer(requests, disable_tqdm)
        if self.processes.rank > 0:
            raise ShareDone
        return answers


def load_model(settings: Settings, folder: Path, name: str) -> EvaluatedModel:
    """The model, warm: what the first generation takes once is not in the measurements. name: of the settings."""
    try:
        model = EvaluatedModel(folder, name, **settings.model, **settings.fields)
    except CheckpointError as e:
        raise CheckpointError(f"{e} (model.path=FOLDER says where the model is)") from e
    model.engine.generate([model.engine.spec.eos_id], gen_length=8, block_length=8)
    return model


def evaluate(config: DictConfig) -> dict | None:
    """Run what the settings say and write the results; the report, but None in a process that is not the first."""
    settings = resolve(config)
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    scored = not settings.is_code or config.execute_code
    protections = sandbox.protections() if settings.is_code and scored else None  # no sandbox: said now
    tasks = load(settings.dataset, config.dataset.path, config.seed, scored)
    model = load_model(settings, folder, fingerprint(config, of_one_answer=True))
    with closing(model.journal):
        try:
            found = simple_evaluate(
                model=model,
                tasks=tasks,
                task_manager=task_manager(),
                num_fewshot=config.dataset.n_shot,
                limit=config.dataset.size,
                batch_size=config.batch_size,
                apply_chat_template=settings.instruct,
                system_instruction=config.dataset.system_prompt,
                confirm_run_unsafe_code=True,
                predict_only=not scored,
                random_seed=config.seed,
                numpy_random_seed=config.seed,
                torch_random_seed=config.seed,
                fewshot_random_seed=config.seed,
            )
        except ShareDone:
            return None
    return report(config, settings, model, found if scored else None, protections)


def report(config, settings, model, found, protections):
    """Write samples.jsonl and results.json."""
    folder = Path(config.out)
    rows = results.samples(model, found)
    results.write(folder / "samples.jsonl", "".join(results.line(row) for row in rows))
    scores = results.scores(found)
    answers = [answer for _, answer in model.answered]
    main = next(iter(scores.values()), {}) if len(scores) == 1 else scores.get(settings.task, {})
    out = {
        "dataset": settings.dataset,
        "metric": settings.metric,
        "accuracy": main.get(settings.metric),
        "not_scored": None if found else "programs run only with execute_code=true",
        "problems": len(rows),
        "scores": scores,
        "costs": results.costs(answers, model.config.gen_length),
        "peak_memory": results.peak_memory(model.engine.device),
        "processes": model.processes.count,
        "known_before": model.known,
        "seed": config.seed,
        "settings": OmegaConf.to_container(config, resolve=True),
        "generation": model.config.to_dict(),
        "sandbox": protections,
        "machine": results.machine(model),
        "versions": results.versions(),
    }
    results.write(folder / "results.json", results.dump(out))
    print(results.summary(out))
    print(folder / "results.json")
    return out


@hydra.main(config_path=str(CONFIGS), config_name="eval", version_base=None)
def run(config: DictConfig) -> None:
    """Hydra's entry."""
    try:
        evaluate(config)
    except DLLMError as e:
        fail(e)


def fail(error: DLLMError):
    """One line on stderr, and exit status 2."""
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    sys.exit(2)


def main():
    """The command."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("lm_eval.api.task").setLevel(logging.ERROR)  # it warns of every data set that is given to it
    try:
        sys.argv[1:] = checked_overrides(sys.argv[1:])
    except ConfigError as e:
        fail(e)
    run()


if __name__ == "__main__":
    main()
