"""Networks shared over sites, so that one surgeon edits models with any number of layers and heads.

Every site is encoded by the same network, sees the mean of all encodings beside its own, and gives its own output (deep
sets, Zaheer et al., arXiv 1703.06114). The actor's outputs are means and standard deviations of one number a site; the
critics' outputs are summed, since the effects of small edits add up.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import relu
from transformers import PreTrainedModel

from preceptor.errors import ConfigError
from preceptor.lm.edit_targets import Role
from preceptor.runs.files import storage_errors
from preceptor.systems.surgery.baselines import Surgeon
from preceptor.systems.surgery.policy import Mlp
from preceptor.systems.surgery.sites import FEATURE_DIM, FEATURES, Sites, edited_targets

SURGEON = "surgeon"
"""Folder of a run with the trained surgeon."""

# A site that does not exist has a Gaussian of mean 0 with one nat less than none: SAC's target of −1 nat a number is
# met there, so padding neither heats nor cools the policy. ½ ln(2πe σ²) = −1, and squashing does nothing at this σ.
_PADDED_LOG_STANDARD_DEVIATION = -2.4189


class SiteNetwork(nn.Module):
    """``num_networks`` networks from flat states (and actions) to numbers of every site, or to one sum.

    Args:
        extra: numbers of a site besides its features: 1 for a critic, which sees the action.
        outputs: numbers of each site; those of an actor are a mean and a logarithm of a standard deviation.
        summed: one output, the sum over sites.
        hidden_dim: width.
        num_networks: that are computed side by side.
        generator: draws the weights.
    """

    def __init__(
        self,
        *,
        extra: int,
        outputs: int,
        summed: bool,
        hidden_dim: int,
        num_networks: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self._extra = extra
        self._summed = summed
        widths = [FEATURE_DIM + extra, hidden_dim, hidden_dim]
        self.encoder = Mlp(widths, num_networks=num_networks, generator=generator)
        self.decoder = Mlp([2 * hidden_dim, hidden_dim, outputs], num_networks=num_networks, generator=generator)

    def forward(self, flat: Float[Tensor, "batch numbers"]) -> Float[Tensor, "networks batch out"]:
        """``flat`` holds the features of all sites, site after site, and then one action a site if this is a critic."""
        num_sites = flat.shape[1] // (FEATURE_DIM + self._extra)
        sites = flat[:, : num_sites * FEATURE_DIM].reshape(len(flat), num_sites, FEATURE_DIM)
        exists = sites[..., :1]  # [batch, site, 1]
        if self._extra:
            actions = flat[:, num_sites * FEATURE_DIM :, None]  # [batch, site, 1]
            sites = torch.cat([sites, actions * exists], dim=-1)
        rows = sites.flatten(0, 1)  # [batch · site, feature]: sites of all models side by side, one product for all
        encoded = relu(self.encoder(rows)).unflatten(1, sites.shape[:2])  # [networks, batch, site, hidden]
        encoded = encoded * exists
        mean = encoded.sum(2, keepdim=True) / exists.sum(1, keepdim=True).clamp(min=1)  # [networks, batch, 1, hidden]
        both = torch.cat([encoded, mean.expand_as(encoded)], dim=-1)
        outputs = self.decoder(both.flatten(1, 2)).unflatten(1, sites.shape[:2])  # [networks, batch, site, outputs]
        if self._summed:
            total: Tensor = (outputs * exists).sum(2)
            return total  # [networks, batch, outputs]
        means, log_deviations = outputs[..., 0] * exists[..., 0], outputs[..., 1]
        log_deviations = torch.where(exists[..., 0] > 0, log_deviations, _PADDED_LOG_STANDARD_DEVIATION)
        return torch.cat([means, log_deviations], dim=-1)  # [networks, batch, 2 · site], as SAC's actor has it


def site_networks(
    state_dim: int, action_dim: int, *, hidden_dim: int, num_critics: int, generator: torch.Generator
) -> tuple[SiteNetwork, SiteNetwork]:
    """Actor and critics over states of any number of sites, of which the buffer's has ``action_dim``."""
    assert state_dim == action_dim * FEATURE_DIM, "a state is the features of every site"
    actor = SiteNetwork(extra=0, outputs=2, summed=False, hidden_dim=hidden_dim, num_networks=1, generator=generator)
    critics = SiteNetwork(
        extra=1, outputs=1, summed=True, hidden_dim=hidden_dim, num_networks=num_critics, generator=generator
    )
    return actor, critics


def flat_state(features: Float[Tensor, "site feature"], num_sites: int) -> Float[Tensor, " numbers"]:
    """``features`` with sites that do not exist appended up to ``num_sites``, as one vector."""
    padded = features.new_zeros(num_sites, FEATURE_DIM)
    padded[: len(features)] = features
    return padded.flatten()


class TrainedSurgeon:
    """The policy of a finished run: the mean action for the sites of any model.

    Attributes:
        kind: of the sites, as in :class:`~preceptor.systems.surgery.sites.Sites`.
        rank: singular triples of a matrix.
        roles: of the attention matrices it edits.
        max_factor: of an edit.
        gradients: whether it sees gradients.
        num_windows: windows that it was trained to see.
        mlp: whether it edits the matrices of MLPs as well.
    """

    def __init__(
        self,
        actor: SiteNetwork,
        *,
        kind: str,
        rank: int,
        roles: tuple[Role, ...],
        max_factor: float,
        gradients: bool,
        num_windows: int,
        mlp: bool = False,
    ) -> None:
        self.actor = actor
        self.kind = kind
        self.rank = rank
        self.roles = roles
        self.max_factor = max_factor
        self.gradients = gradients
        self.num_windows = num_windows
        self.mlp = mlp

    def sites(self, model: PreTrainedModel) -> Sites:
        """What it edits of ``model``."""
        targets = edited_targets(model, self.roles, mlp=self.mlp)
        return Sites(model, targets, kind=self.kind, rank=self.rank, max_factor=self.max_factor)

    @torch.no_grad()
    def act(self, features: Float[Tensor, "site feature"]) -> Float[Tensor, " site"]:
        """The policy's mean action, in [−1, 1]."""
        mean: Tensor = self.actor(features.flatten()[None])[0, 0, : len(features)]
        return torch.tanh(mean)

    def save(self, folder: Path) -> None:
        """Writes ``surgeon.safetensors`` and ``surgeon.json`` into ``folder``."""
        settings = {
            "features": list(FEATURES),
            "hidden_dim": self.actor.encoder.weights[0].shape[-1],
            "kind": self.kind,
            "rank": self.rank,
            "roles": list(self.roles),
            "max_factor": self.max_factor,
            "gradients": self.gradients,
            "num_windows": self.num_windows,
            "mlp": self.mlp,
        }
        with storage_errors(f"save the surgeon in {folder}"):
            folder.mkdir(parents=True, exist_ok=True)
            save_file(
                {name: value.contiguous() for name, value in self.actor.state_dict().items()},
                folder / "surgeon.safetensors",
            )
            (folder / "surgeon.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, run: Path) -> TrainedSurgeon:
        """The surgeon of the finished run in ``run``.

        Raises:
            ConfigError: there is none, or it was trained on other features.
        """
        folder = run / SURGEON
        try:
            settings = json.loads((folder / "surgeon.json").read_text(encoding="utf-8"))
            weights = load_file(folder / "surgeon.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            raise ConfigError(
                f"{run} has no trained surgeon; give the folder of a finished run of: "
                "preceptor run surgery --preset planted"
            ) from error
        if settings.pop("features") != list(FEATURES):
            raise ConfigError(f"the surgeon in {run} was trained on other features; train it with this version")
        actor = SiteNetwork(
            extra=0,
            outputs=2,
            summed=False,
            hidden_dim=settings.pop("hidden_dim"),
            num_networks=1,
            generator=torch.Generator(),
        )
        actor.load_state_dict(weights)
        return cls(actor, **settings | {"roles": tuple(settings["roles"])})


class SiteFeatures:
    """What a pretrained surgeon sees of the student in the three phases: every site, on fresh text at each edit.

    Args:
        sites: of the student.
        windows: of the text, by the number of the edit.
        gradients: whether it sees gradients.
    """

    def __init__(self, sites: Sites, *, windows: Callable[[int], Tensor], gradients: bool) -> None:
        self._sites = sites
        self._windows = windows
        self._gradients = gradients
        self._num_seen = 0
        self.dim = sites.action_dim * FEATURE_DIM

    def state(self, *, loss: float) -> Float[Tensor, " state"]:
        """The features of all sites, site after site; ``loss`` is seen on their own windows instead."""
        self._num_seen += 1
        return self._sites.features(self._windows(self._num_seen), gradients=self._gradients)[0].flatten()

    def observe(self, action: Float[Tensor, " action"], *, reward: float, committed: bool) -> None:
        """Every edit is an episode of its own, so the last one is forgotten."""

    def state_dict(self) -> dict[str, Any]:
        """How many edits were seen."""
        return {"num_seen": self._num_seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over :meth:`state_dict`."""
        self._num_seen = state["num_seen"]


class PretrainedSurgeon(Surgeon):
    """A trained policy in the three phases: it proposes its mean action and learns no more."""

    def __init__(self, trained: TrainedSurgeon) -> None:
        self._trained = trained

    def propose(self, state: Float[Tensor, " state"], *, generator: torch.Generator) -> Float[Tensor, " action"]:
        """The policy's mean."""
        return self._trained.act(state.view(-1, FEATURE_DIM))

    def state_dict(self) -> dict[str, Any]:
        """Nothing changes."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to take over."""
