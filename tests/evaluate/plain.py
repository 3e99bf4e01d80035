"""The benchmark's training as one would write it for a single run: layers, torch.optim.AdamW, a loop over slides."""

from itertools import pairwise

import torch
import torch.nn.functional as F

from hpcssl.evaluate.metrics import auc
from hpcssl.evaluate.mil.batched_heads import dropout_mask, initial_weights, unpack
from hpcssl.evaluate.mil.fits import head_sizes
from hpcssl.optim.values import cosine


class PlainHead(torch.nn.Module):
    """Layers and autograd; its dropout takes the masks as they are drawn."""

    def __init__(self, sizes, seed=None, flat_1P=None):
        super().__init__()
        widths = [sizes.dim, *sizes.hidden]
        self.sizes = sizes
        self.hidden = torch.nn.ModuleList(torch.nn.Linear(a, b) for a, b in pairwise(widths))
        self.classifier = torch.nn.Linear(widths[-1], sizes.classes)
        if sizes.pooling == "attention":
            self.tanh, self.sigmoid = (torch.nn.Linear(widths[-1], sizes.attention) for _ in range(2))
            self.score = torch.nn.Linear(sizes.attention, 1)
        w = unpack(initial_weights(sizes, [seed]) if flat_1P is None else flat_1P, sizes)
        for name, weight, bias in self.named_weights():
            source, half = ("branches", ["tanh", "sigmoid"].index(name)) if name in ("tanh", "sigmoid") else (name, 0)
            rows = slice(half * len(weight), (half + 1) * len(weight))
            weight.data.copy_(w[source][0].T[rows])
            bias.data.copy_(w[f"{source}_bias"][0, 0, rows])

    def named_weights(self):
        layers = {f"hidden{i}": layer for i, layer in enumerate(self.hidden)}
        layers |= {n: getattr(self, n) for n in ("tanh", "sigmoid", "score", "classifier") if hasattr(self, n)}
        return [(name, layer.weight, layer.bias) for name, layer in layers.items()]

    def forward(self, x, mask=None):
        *hidden, gated = (
            mask.float().split([*self.sizes.hidden, self.sizes.dropout_units - sum(self.sizes.hidden)], dim=1)
            if mask is not None
            else [1.0] * (len(self.hidden) + 1)
        )
        one, both = (256 / (256 - drop) if mask is not None else 1.0 for drop in self.sizes.dropped)
        for layer, keep in zip(self.hidden, hidden, strict=True):
            x = torch.relu(layer(x)) * keep * one
        if self.sizes.pooling == "mean":
            pooled = x.mean(dim=0)
        elif self.sizes.pooling == "max":
            pooled = x.max(dim=0).values
        else:
            scores = self.score(torch.tanh(self.tanh(x)) * torch.sigmoid(self.sigmoid(x)) * gated * both)
            pooled = torch.softmax(scores.squeeze(1), dim=0) @ x
        return self.classifier(pooled)


def fit_plain(slides, labels, run, preset, seed=0):
    """Return (epoch, metric) → value of one run, slide after slide; labels are class numbers."""
    sizes = head_sizes(preset, slides[0].shape[1], labels)
    head = PlainHead(sizes, run.key(seed, "weights"))
    weights = [p for name, p in head.named_parameters() if name.endswith("weight")]
    biases = [p for name, p in head.named_parameters() if name.endswith("bias")]
    optimizer = torch.optim.AdamW([{"params": weights}, {"params": biases, "weight_decay": 0.0}])
    total, warmup = preset.epochs * len(run.train), preset.warmup_epochs * len(run.train)
    found, step = {}, 0
    for epoch in range(1, preset.epochs + 1):
        losses = []
        for slide in run.order(seed, epoch):
            lr = cosine(step, base=preset.lr, final=preset.final_lr, total_steps=total, warmup_steps=warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.param_groups[0]["weight_decay"] = cosine(
                step, base=preset.weight_decay, final=preset.final_weight_decay, total_steps=total
            )
            x = torch.from_numpy(slides[slide])
            mask = dropout_mask(sizes, run.key(seed, "dropout"), step, len(x)) if preset.dropout else None
            loss = F.cross_entropy(head(x, mask), torch.tensor(labels[slide]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            step += 1
        with torch.no_grad():
            logits = torch.stack([head(torch.from_numpy(slides[i])) for i in run.val])
        targets = torch.from_numpy(labels[run.val])
        found[epoch, "train_loss"] = sum(losses) / len(losses)
        found[epoch, "val_loss"] = F.cross_entropy(logits, targets).item()
        found[epoch, "auc"] = auc(targets.numpy(), logits.double().softmax(dim=1).numpy())
        found[epoch, "accuracy"] = (logits.argmax(dim=1) == targets).double().mean().item()
    return found
