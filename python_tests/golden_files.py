"""Golden files for tests: their cases, and the models they were recorded with, each written and loaded once."""

import json
import tempfile
from pathlib import Path

import golden_models
from reference.model import ReferenceModel

from dllm_ext import Engine


class Recordings:
    """Some files of golden/, by name without .json.

    Attributes:
        data: The files' contents.
        cases: Case id -> case, of all files.
        models: Model name -> {config, seed, recipe, digest}.
    """

    def __init__(self, *names):
        folder = Path(__file__).parent / "golden"
        self.data = [json.loads((folder / f"{name}.json").read_text()) for name in names]
        self.cases = {case["id"]: case for data in self.data for case in data["cases"]}
        self.models = {name: model for data in self.data for name, model in data["models"].items()}
        self._engines, self._references = {}, {}

    def check(self):
        """Every machine draws the weights of the recording, and the files agree with one another."""
        for name, model in self.models.items():
            assert model["recipe"] == golden_models.RECIPE, name
            assert golden_models.digest(golden_models.weights(model["config"], model["seed"])) == model["digest"], name
        for data in self.data:
            for name, model in data["models"].items():
                assert model == self.models[name], name
        assert sum(len(data["cases"]) for data in self.data) == len(self.cases)

    def engine(self, case):
        """The case's model in the engine, fp32."""
        return self._loaded(
            self._engines, case, lambda folder: Engine.from_pretrained(folder, device="cpu", dtype="float32")
        )

    def reference(self, case):
        """The case's model in the Python reference, fp32."""
        return self._loaded(self._references, case, ReferenceModel.from_folder)

    def _loaded(self, loaded, case, load):
        name = case["model"]
        if name not in loaded:
            model = self.models[name]
            named_arrays = golden_models.weights(model["config"], model["seed"])
            with tempfile.TemporaryDirectory() as folder:
                loaded[name] = load(golden_models.write_folder(folder, model["config"], named_arrays))
        return loaded[name]
