"""Runs in an interpreter with torch, transformers and accelerate: opens a packed BitNet folder and saves it again.

python peer_bitnet.py FOLDER IDS.npy LOGITS.npy AGAIN
"""

import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM

folder, ids, logits, again = sys.argv[1:]
load = AutoModelForCausalLM.from_pretrained
model, told = load(folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
if wrong := {key: found for key, found in told.items() if found}:
    raise SystemExit(f"{folder}: {wrong}")
with torch.no_grad():
    np.save(logits, model(torch.from_numpy(np.load(ids))).logits.numpy())
model.save_pretrained(again)
