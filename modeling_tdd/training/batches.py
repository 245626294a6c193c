# stub of the lead, to be replaced by the data helper's
import random
import numpy as np
import torch
from accelerate.utils import set_seed
from torch.utils.data import Dataset

ORDER, DATA, MODEL = range(3)


def seed_for(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1)[0])


class TrainingRows(Dataset):
    def __init__(self, rows, seed, multiple_of):
        if len(rows) < multiple_of:
            raise ValueError(f"`training.batch_size` is {multiple_of}, but there are only {len(rows)} images.")
        self.rows, self.seed, self.length = rows, seed, len(rows) // multiple_of * multiple_of
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def __len__(self):
        return self.length

    def set_epoch(self, epoch):
        self.epoch.fill_(epoch)

    def __getitem__(self, index):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices):
        epoch = int(self.epoch)
        generator = torch.Generator().manual_seed(seed_for(self.seed, ORDER, epoch))
        order = torch.randperm(len(self.rows), generator=generator)
        set_seed(seed_for(self.seed, DATA, epoch, indices[0]))
        return [self.rows[int(order[i])] for i in indices]
