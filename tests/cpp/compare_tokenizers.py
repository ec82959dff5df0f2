"""Compare the ids that C++ makes of text, through ONNX Runtime GenAI, with those of `tokenizers`.

    python -m tests.cpp.compare_tokenizers 100000 model.cpc ...

For every distinct tokenizer of the bundles: how many lines differ, how many are refused, and examples of each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tokenizers import Tokenizer

from cpcompile.bundle.reader import open_bundle
from tests.cpp.building import build, genai
from tests.cpp.lines import lines


def compare(program: Path, bundle: Path, context: str, texts: list[str]) -> tuple[list[str], Counter[str]]:
    """The texts that differ, and how often C++ gave a reason to refuse one."""
    tokenizer = Tokenizer.from_file(str(open_bundle(bundle).tokenizer(context)))
    job = {"bundle": str(bundle), "context": context, "encode": texts}
    environment = os.environ | {"CPCOMPILE_GENAI": str(genai())}
    done = subprocess.run([program], input=json.dumps([job]), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    (answer,) = json.loads(done.stdout)
    assert "result" in answer, answer
    refused = Counter(each for each in answer["result"] if isinstance(each, str))
    expected = tokenizer.encode_batch(texts, add_special_tokens=False)
    pairs = zip(texts, answer["result"], expected, strict=True)
    return [text for text, own, each in pairs if not isinstance(own, str) and own != each.ids], refused


def main(count: int, bundles: list[Path]) -> int:
    texts, seen, wrong = lines(count), set(), 0
    program = build("plain", "probe") / "tests" / "cpp" / "probe"
    for bundle in bundles:
        opened = open_bundle(bundle)
        for context in opened.contexts:
            if (path := opened.tokenizer(context)) in seen:
                continue
            seen.add(path)
            different, refused = compare(program, bundle, context, texts)
            wrong += len(different)
            print(f"{bundle} {context}: {len(texts):,} lines, {len(different):,} differ, {refused.total():,} refused")
            for text in different[:20]:
                print(f"    differs: {text!r}")
            for reason, number in refused.most_common():
                print(f"    {number:,} refused: {reason}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), [Path(each) for each in sys.argv[2:]]))
