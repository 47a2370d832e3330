"""The order in which `burn-peft train` takes its examples: the same ChaCha8 generator, shuffles and groups by length."""

WORDS = 0xFFFFFFFF


def chacha8(seed):
    """The 64-bit numbers of Rust's `ChaCha8Rng::seed_from_u64(seed)`."""
    key = []
    for _ in range(8):  # PCG32 makes a key of the seed
        seed = (seed * 6364136223846793005 + 11634580027462260723) & 0xFFFFFFFFFFFFFFFF
        word, turn = ((seed >> 18) ^ seed) >> 27 & WORDS, seed >> 59
        key.append((word >> turn | word << (32 - turn)) & WORDS)
    constants = [0x61707865, 0x3320646E, 0x79622D32, 0x6B206574]
    columns = [(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)]
    diagonals = [(0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)]
    counter = 0
    while True:
        start = constants + key + [counter & WORDS, counter >> 32, 0, 0]
        block = list(start)
        for _ in range(4):
            for a, b, c, d in columns + diagonals:
                for to, by, turned, turn in [(a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)]:
                    block[to] = (block[to] + block[by]) & WORDS
                    mixed = block[turned] ^ block[to]
                    block[turned] = (mixed << turn | mixed >> (32 - turn)) & WORDS
        words = [(one + other) & WORDS for one, other in zip(block, start)]
        yield from (low | high << 32 for low, high in zip(words[::2], words[1::2]))
        counter += 1


def shuffle(items, seed):
    """Fisher and Yates."""
    numbers = chacha8(seed & 0xFFFFFFFFFFFFFFFF)
    for last in range(len(items) - 1, 0, -1):
        other = next(numbers) % (last + 1)
        items[last], items[other] = items[other], items[last]


def length_grouped(lengths, size, seed, epoch):
    """Pools of 50 batches, each sorted, then the batches shuffled, that of the longest item first."""
    order = list(range(len(lengths)))
    shuffle(order, seed + epoch * 0x9E3779B97F4A7C15)
    batches = []
    for start in range(0, len(order), 50 * size):
        pool = sorted(order[start : start + 50 * size], key=lambda item: -lengths[item])
        batches += [pool[i : i + size] for i in range(0, len(pool), size)]
    shuffle(batches, seed + epoch + 1)
    first = max(range(len(batches)), key=lambda i: (max(lengths[item] for item in batches[i]), -i))
    batches[0], batches[first] = batches[first], batches[0]
    return batches


def steps(lengths, size, seed, count):
    """The batches of `count` optimizer steps, epoch after epoch."""
    made, epoch = [], 0
    while len(made) < count:
        made += length_grouped(lengths, size, seed, epoch)
        epoch += 1
    return made[:count]
