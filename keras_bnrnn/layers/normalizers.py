"""How a cell's step normalises at its sites in one timestep."""

from keras import ops

from keras_bnrnn import statistics as stats

WHOLE = slice(None)


class Normalizer:
    """The `norm` of a step: normalises at some sites, and nowhere else.

    Args:
        norms: Dict from the name of a site to its `SequenceBatchNorm`. At other sites
            a pre-activation stays as it is.
    """

    def __init__(self, norms):
        self._norms = norms
        self._kept = {site: [] for site in norms}

    def __call__(self, site, a, columns=WHOLE):
        """Normalises a pre-activation.

        Args:
            site: The name of the site.
            a: Tensor (B, ...), the pre-activation.
            columns: Slice, the columns of the site that `a` consists of. Default: all.
        """
        if site not in self._norms:
            return a
        y, kept = self._normalize(site, a, columns)
        self._kept[site].append((columns, kept))
        return y

    def _kept_by_columns(self, site):
        width = self._norms[site].moving_mean.shape[0]
        return in_order_of_columns(self._kept[site], width, site)


class BatchNormalizer(Normalizer):
    """Normalises by the moments of the valid rows of a timestep.

    Args:
        norms: As in `Normalizer`.
        affine: Dict from each site to its gamma and beta. Default: the normalizer reads
            them. Inside a loop they must be given: a gradient would keep a variable
            that is read there for each timestep.
        valid: Boolean tensor (B, 1), or `None`.
    """

    def __init__(self, norms, affine=None, valid=None):
        super().__init__(norms)
        self._affine = affine_of(norms) if affine is None else affine
        self._valid = valid

    def _normalize(self, site, a, columns):
        norm = self._norms[site]
        x = ops.cast(a, norm.moving_mean.dtype)
        if self._valid is not None:
            x = ops.where(self._valid, x, 0.0)
        mean, variance, count = norm.batch_moments(x, self._valid, (0,))
        gamma, beta = (None if p is None else p[columns] for p in self._affine[site])
        y = stats.normalize(x, mean, variance, gamma, beta, norm.epsilon)
        return ops.cast(y, a.dtype), (mean[0], variance[0], count[0])

    def moments(self):
        """Mean (width,), variance (width,) and count (1,) of each site, in one list."""
        moments = []
        for site in self._norms:
            parts = self._kept_by_columns(site)
            means, variances, counts = zip(*parts, strict=True)
            moments += [ops.concatenate(means), ops.concatenate(variances), counts[0]]
        return moments


def affine_of(norms):
    """Dict from each site to gamma and beta, in the dtype of the statistics."""
    return {site: norm.affine() for site, norm in norms.items()}


class PopulationNormalizer(Normalizer):
    """Normalises by the population statistics, and keeps the pre-activations."""

    def _normalize(self, site, a, columns):
        scale, shift = (p[columns] for p in self._norms[site].scale_and_shift())
        y = ops.cast(ops.cast(a, scale.dtype) * scale + shift, a.dtype)
        return y, a

    def pre_activations(self, site):
        """The pre-activations at a site, (B, width)."""
        return ops.concatenate(self._kept_by_columns(site), axis=-1)


def in_order_of_columns(parts, width, site):
    """The values of a step's calls of `norm` at a site, in the order of columns.

    Args:
        parts: List of `(columns, value)`.
        width: The number of columns of the site.
        site: The name of the site.

    Raises:
        ValueError: If a step normalises a column twice or not at all.
    """
    spans = sorted(
        ((columns.indices(width), value) for columns, value in parts),
        key=lambda part: part[0][0],
    )
    expected = 0
    for (start, stop, stride), _ in spans:
        if start != expected or stride != 1:
            break
        expected = stop
    if expected != width or not spans:
        received = [(start, stop) for (start, stop, _), _ in spans]
        raise ValueError(
            "A step must normalise each column of a site once: `columns` must be "
            f"slices that make up [0, {width}). Received: columns={received} at site "
            f"{site!r}"
        )
    return [value for _, value in spans]
