"""Normalises pre-activations at the sites of a cell, in one timestep."""

from keras import ops

from keras_bnrnn import statistics as stats

WHOLE = slice(None)


class Normalizer:
    """The `norm` function of a step, base of the normalizers below.

    Args:
        norms: Dict from the name of a site to its `SequenceBatchNorm`. Pre-activations
            at other sites are returned unchanged.
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

        Returns:
            Tensor of the shape of `a`.
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
            the variables. Inside a loop `affine` is required: the gradient would store
            a variable that is read there once for each timestep.
        valid: Boolean tensor (B, 1), true at valid rows. `None` (default): all rows
            are valid.
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
        """Lists mean (width,), variance (width,) and count (1,) of each site."""
        moments = []
        for site in self._norms:
            parts = self._kept_by_columns(site)
            means, variances, counts = zip(*parts, strict=True)
            moments += [ops.concatenate(means), ops.concatenate(variances), counts[0]]
        return moments


def affine_of(norms):
    """Returns gamma and beta of each site, in the dtype of the statistics."""
    return {site: norm.affine() for site, norm in norms.items()}


class PopulationNormalizer(Normalizer):
    """Normalises by the population statistics, and records the pre-activations."""

    def _normalize(self, site, a, columns):
        scale, shift = (p[columns] for p in self._norms[site].scale_and_shift())
        y = ops.cast(ops.cast(a, scale.dtype) * scale + shift, a.dtype)
        return y, a

    def pre_activations(self, site):
        """Returns the pre-activations (B, width) recorded at a site."""
        return ops.concatenate(self._kept_by_columns(site), axis=-1)


class Recorder:
    """A `norm` function that records pre-activations and changes nothing.

    Args:
        site: The name of the site whose pre-activations are recorded. The cell need not
            normalise there.
        width: Int, the number of columns of the site.
    """

    def __init__(self, site, width):
        self._site = site
        self._width = width
        self._kept = []

    def __call__(self, site, a, columns=WHOLE):
        if site == self._site:
            self._kept.append((columns, a))
        return a

    def pre_activations(self):
        """Returns the recorded pre-activations (B, width)."""
        parts = in_order_of_columns(self._kept, self._width, self._site)
        return ops.concatenate(parts, axis=-1)


def in_order_of_columns(parts, width, site):
    """Sorts the values that a step recorded at a site by their columns.

    Args:
        parts: List of `(columns, value)`, one for each call of `norm`.
        width: The number of columns of the site.
        site: The name of the site.

    Raises:
        ValueError: If a step normalised a column twice or not at all.
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
            "A step must normalise each column of a site once: the slices `columns` "
            f"must together cover [0, {width}). Received: columns={received} at site "
            f"{site!r}"
        )
    return [value for _, value in spans]
