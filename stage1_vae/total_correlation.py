"""Total correlation of the code, estimated by a critic (FactorVAE, Kim & Mnih 2018)."""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from calotype import loop
from calotype.randomness import key, uniform
from calotype.stage1_vae.adversary import average_gradients
from calotype.stage1_vae.config import VaeSettings

_WIDTH, _LAYERS = 256, 4


class TotalCorrelation:
    """A critic that tells codes of pictures from codes whose elements were shuffled between pictures.

    Its logit is an estimate of log q(z) / prod_j q(z_j); the mean of that over q(z) is the total correlation (their
    eq. 3). It learns once an optimiser step, on the codes of the whole batch of all processes.
    """

    def __init__(self, settings: VaeSettings, size: int, accelerator: Accelerator):
        self.settings, self.accelerator = settings, accelerator
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(settings.seed, "total correlation"))
            self.critic = _mlp(size).to(accelerator.device)
        lr = settings.discriminator_lr or 0.1 * settings.lr
        self.optimizer = loop.make_optimizer(self.critic, settings, lr, betas=(0.5, 0.9))
        self.seen: list[Tensor] = []

    def term(self, z: Tensor) -> Tensor:
        """The estimate (B,) in nats for codes z (B, c, h, w); its gradient reaches z and not the critic."""
        z = z.flatten(1)
        self.seen.append(z.detach())
        frozen = {name: parameter.detach() for name, parameter in self.critic.named_parameters()}
        return torch.func.functional_call(self.critic, frozen, (z,)).squeeze(1)

    def update(self, step: int) -> dict[str, Tensor]:
        """One step of the critic on what was seen."""
        mine = torch.cat(self.seen)
        self.seen.clear()
        every = self.accelerator.gather(mine)
        rank, size = self.accelerator.process_index, len(mine)
        shuffled = shuffle_columns(every, self.settings.seed, step)[rank * size : (rank + 1) * size]
        joint, independent = self.critic(mine).squeeze(1), self.critic(shuffled).squeeze(1)
        loss = 0.5 * (F.softplus(-joint).mean() + F.softplus(independent).mean())
        loss.backward()
        average_gradients(self.accelerator, self.critic)
        loop.update(self.accelerator, self.critic, self.optimizer, self.settings.clip)
        right = 0.5 * ((joint > 0).float().mean() + (independent < 0).float().mean())
        return {"critic": loss.detach(), "critic_accuracy": right}


def shuffle_columns(z: Tensor, seed: int, step: int) -> Tensor:
    """Codes (N, d) of a whole batch, each column in an order of its own: a sample of prod_j q(z_j)."""
    orders = uniform(seed, "total correlation", step * len(z), len(z), (z.shape[1],)).argsort(0)
    return z.gather(0, orders.to(z.device))


def _mlp(size: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(_LAYERS):
        layers += [nn.Linear(size if i == 0 else _WIDTH, _WIDTH), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Linear(_WIDTH, 1))
