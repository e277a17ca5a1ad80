"""
What stage 1 measured, for people: the figures of bridge.json and the table that is printed.

bridge.judge measures at every rank; here ranks 1, 2, 4, ... up to the full width are shown, and the
rank that will be used. lam and rho2 are kept of every component: 1 MB for 28 layers of 2048. Simpler
than usual: plain dictionaries, no plotting (studies/figures.py draws them).

Letters: R full rank, r rank; lam, rho2 and E: see bridge_parts/closed_form.py.
"""

COSINES = ('cos', 'before', 'shuffled', 'mean_only')         # of the bridge, and of three controls


def theorem_3_rank(judged):
    """The rank that Theorem 3 recommends for all layers together: the least sum of E(r), where each
    layer's is divided by its variance."""
    total = sum(layer['E'] / layer['total'] for layer in judged.values())    # (R,)
    return int(total.argmin()) + 1


def report(judged, layer_map, asked):
    """What bridge.judge returned -> a dictionary for bridge.json, at a few ranks.

    asked: the rank that the config asks for; 0 means the one that Theorem 3 recommends.
    """
    R = len(next(iter(judged.values()))['cos'])
    best = theorem_3_rank(judged)
    used = min(asked or best, R)
    powers_of_two = {2**i for i in range(R.bit_length())}
    ranks = sorted(powers_of_two | {R, used})
    layers = {}
    for layer, found in judged.items():
        total = found['total']
        variance = found['lam'].cumsum(0)                                    # (R,) of the first r
        predicted = (found['lam'] * found['rho2']).cumsum(0)                 # (R,)
        shown = {'teacher layer': layer_map[layer], 'rows': found['rows'], 'variance': total}
        for name in COSINES:
            shown[name] = at_ranks(found[name], ranks)

        # Of the first r components: the share that is predicted, the share of all variance that
        # they have, and Theorem 3's loss.
        shown['R2'] = at_ranks(predicted / variance, ranks)
        shown['explained'] = at_ranks(variance / total, ranks)
        shown['E'] = at_ranks(found['E'] / total, ranks)

        # Theorem 3's two numbers of every component: what E is made of at any rank.
        for key in ('lam', 'rho2'):
            shown[key] = [float(f'{value:.6g}') for value in found[key].tolist()]
        shown['best rank'] = int(found['E'].argmin()) + 1
        layers[str(layer)] = shown
    return {'rank': best, 'used': used, 'ranks': R, 'layers': layers}


def at_ranks(values, ranks):
    """Some of the values (R,) of ranks 1..R -> {rank: value}, ready for JSON."""
    return {str(r): float(values[r - 1]) for r in ranks}


def table(figures):
    """bridge.json's figures -> lines to print: a row per rank with means over the layers, and the
    last layer's cosine. A teacher that reads gibberish shows in the last layer, and not in the
    mean."""
    layers = list(figures['layers'].values())
    titles = ('cosine', 'last layer', 'R2', 'explained', 'shuffled', 'mean only', 'before')
    lines = [f'{"rank":>6}' + ''.join(f'{title:>12}' for title in titles)]
    for r in layers[-1]['cos']:
        mean = {}
        for key in ('cos', 'R2', 'explained', 'shuffled', 'mean_only', 'before'):
            mean[key] = sum(layer[key][r] for layer in layers) / len(layers)
        last_layer = layers[-1]['cos'][r]
        cells = [mean.pop('cos'), last_layer, *mean.values()]
        lines.append(f'{r:>6}' + ''.join(f'{cell:12.3f}' for cell in cells))
    lines.append(f"Theorem 3's rank: {figures['rank']}; align {figures['align']:.3f}; "
                 f"{figures['forwards per answer']:g} forward(s) per answer and model")
    return lines
