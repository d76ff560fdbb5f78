"""Answers of vLLM in a process of its own: `python vllm_engine.py FOLDER eager|compiled`.

FOLDER/requests.pkl has the model, a bias of tokens, and the requests: prompts of `LLM.generate`, then messages of
`LLM.chat`. FOLDER/answers.json gets the ids of each prompt and answer, the answer's log-probabilities and its text.
"""

import json
import os
import pickle
import sys
from pathlib import Path


SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
MOST_NEW_TOKENS = 16


def main(folder: Path, *options: str) -> None:
    from vllm import LLM, SamplingParams

    given = pickle.loads((folder / "requests.pkl").read_bytes())
    llm = LLM(
        given["model"],
        dtype="float32",
        enforce_eager="eager" in options,
        max_num_seqs=8,
        limit_mm_per_prompt={"image": 3, "video": 3},
        allowed_local_media_path=str(folder),
    )
    parameters = SamplingParams(
        temperature=0, max_tokens=MOST_NEW_TOKENS, logprobs=0, skip_special_tokens=False, logit_bias=given.get("bias")
    )
    prompts = [request for request in given["requests"] if isinstance(request, dict)]
    messages = [request for request in given["requests"] if isinstance(request, list)]
    answers = llm.generate(prompts, parameters, use_tqdm=False)  # as one batch
    answers += llm.chat(messages, parameters, use_tqdm=False) if messages else []
    found = []
    for answer in answers:
        output = answer.outputs[0]
        found.append(
            {
                "prompt": list(answer.prompt_token_ids),
                "answer": list(output.token_ids),
                "logprobs": [one[id].logprob for one, id in zip(output.logprobs, output.token_ids, strict=True)],
                "text": output.text,
            }
        )
    (folder / "answers.json").write_text(json.dumps(found))


if __name__ == "__main__":
    os.environ.update(SETTINGS)
    main(Path(sys.argv[1]), *sys.argv[2:])
