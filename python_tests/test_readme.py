"""What README.md shows is what happens."""

import re
from pathlib import Path

import pytest

from dllm_ext import Engine

README = Path(__file__).parents[1] / "README.md"
pytestmark = pytest.mark.skipif(not README.exists(), reason="needs the source tree")


def test_the_answer_shown_is_the_answer_given():
    text = README.read_text()
    question = re.search(r'dllm generate "([^"]+\?)"', text).group(1)
    shown = re.search(r"<!-- ci:answer -->\n```bash\n.*?```\n```\n(.*?)\n```", text, re.DOTALL).group(1)
    assert Engine.from_pretrained("mini-llada").generate(question).text == shown


def test_the_python_example_runs(capsys):
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL).group(1)
    scope = {}
    exec(code, scope)
    assert "#### 13" in capsys.readouterr().out
    assert len(scope["exact"].token_ids) == 64 and scope["exact"].nfe == 64
