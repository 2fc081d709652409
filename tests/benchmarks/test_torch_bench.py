"""The torch peer: its shortcut past the head computes the same loss."""

import torch
import transformers


def test_logits_of_targets_alone_give_the_same_loss(load_peer):
    peer = load_peer("torch_bench")
    config = peer.model_a_config(64)
    config.update({"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32})
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config)
    rows = torch.randint(1, 64, (2, 9))
    target = torch.arange(9)[None] >= torch.tensor([[5], [7]])
    losses = [peer.supervised_loss(model, rows, target, kind) for kind in ("all", "targets")]
    torch.testing.assert_close(*losses)
