"""What a type checker tells who writes a call."""

import json
import subprocess
import sys

import pytest

CALLS = """\
import mmneurons as mmn

vlm = mmn.load()
one = mmn.find(vlm, "a.png", maps=True).caption
several = [found.caption for found in mmn.find(vlm, ["a.png"], words="dog")]
text = vlm.caption("a.png", "What is this?").upper()
mmn.find(vlm, "a.png", mapz=True)
vlm.caption(["a.png"], max_tokens=3)
mmn.edit(vlm, "a.png", source="dog", tarjet="cat")
mmn.edit(vlm, "a.png", source="dog", target="cat", method="rome").save("p.safetensors")
mmn.edit(vlm, "a.png", source="dog", target="cat", method="lora").applied(vlm)
mmn.edit(vlm, "a.png", source="dog", target="cat", method="lora").save("p.safetensors")
"""


@pytest.mark.slow
def test_a_misspelt_argument_is_refused_by_the_type_checker(tmp_path):
    (tmp_path / "calls.py").write_text(CALLS)
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "calls.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    found = json.loads(done.stdout)["generalDiagnostics"]
    refused = {problem["range"]["start"]["line"] for problem in found if problem["severity"] == "error"}
    assert refused == {6, 7, 8, 11}
