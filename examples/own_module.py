"""An equilibrium layer in a LightningModule of your own, with an ordinary trainer."""

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastdeq
from fastdeq.nn import DenseCell
from fastdeq.regularizers import skip_loss


class Denoiser(LightningModule):
    """Maps noisy points to the circle that they come from."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        deq = fastdeq.SkipDeepEquilibriumNetwork(DenseCell(width), nn.Linear(width, width))
        self.model = fastdeq.DEQChain(nn.Linear(2, width), deq, nn.Linear(width, 2))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        noisy, clean = batch
        restored, solution = self.model(noisy)
        self.log("nfe", solution.nfe.double().mean())
        return nn.functional.mse_loss(restored, clean) + 0.1 * skip_loss(solution)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def main() -> tuple[float, float]:
    torch.manual_seed(0)
    angles = 2 * torch.pi * torch.rand(512)
    clean = torch.stack((angles.cos(), angles.sin()), dim=1)
    noisy = clean + 0.2 * torch.randn(512, 2)
    module = Denoiser()
    trainer = Trainer(
        max_epochs=5,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(TensorDataset(noisy, clean), batch_size=32, shuffle=True)
    trainer.fit(module, loader)
    with torch.no_grad():
        restored, _ = module.model(noisy)
    before, after = ((points - clean).square().mean().item() for points in (noisy, restored))
    print(f"squared error of the noisy points {before:.4f}, of the restored ones {after:.4f}")
    return before, after


if __name__ == "__main__":
    main()
