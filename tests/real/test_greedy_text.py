"""SmolLM2's greedy text is transformers' (both load the GGUF file)."""

import numpy as np
import pytest

import specjax as sj
from specjax.loading.load import _packaged

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PROMPTS = (
    "What is the capital of France, and why is it famous?",
    "Write a Python function that reverses a linked list.",
    "If a train travels 60 km in 45 minutes, what is its speed in km/h?",
    "Translate to Spanish: The weather is lovely today.",
    "List three uses of a paperclip.",
    "Explain photosynthesis to a ten-year-old.",
    "Write a haiku about the sea.",
    "Who wrote 'Pride and Prejudice', and when?",
    "Give me a recipe for pancakes.",
    "Summarise: The cat sat on the mat. The dog chased the cat. The cat climbed a tree.",
)


@pytest.mark.full
def test_smollm2_greedy_text(smollm2):
    path = _packaged("smollm2-135m-instruct")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    for prompt in PROMPTS:
        ids = smollm2.tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
        ours = sj.generate(smollm2, ids, max_new_tokens=64, capacity=192).tokens
        with torch.no_grad():
            expected = theirs.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False)[0, len(ids) :].numpy()
        assert len(expected) > 8
        np.testing.assert_array_equal(ours, expected, err_msg=prompt)
