"""Collects Prometheus metrics of the local server."""

import contextlib
import dataclasses
import time

import prometheus_client

_PREFIX = "keras_bnrnn_serving_"


@dataclasses.dataclass
class Record:
    """The metric labels of one request.

    `model`, `version` and `signature` stay empty unless they exist on the server, so
    that requests with unknown names create no new time series.

    Attributes:
        status: str, the HTTP status of a REST response (`200`) or the name of the
            status code of a gRPC response (`OK`); `ABANDONED` if there was no response.
        model: str, the name of the model.
        version: str, the version of the model.
        signature: str, the name of the signature.
    """

    status: str = "ABANDONED"
    model: str = ""
    version: str = ""
    signature: str = ""


class Metrics:
    """The metrics of one server, in a separate registry.

    | name | kind | labels |
    |---|---|---|
    | `keras_bnrnn_serving_requests_total` | counter | protocol, method, model, version, signature, status |
    | `keras_bnrnn_serving_request_seconds` | histogram | protocol, method, model |
    | `keras_bnrnn_serving_requests_in_flight` | gauge | protocol |
    | `keras_bnrnn_serving_loaded_version` | gauge, 1 while served | model, version |
    | `keras_bnrnn_serving_load_failures_total` | counter | model |

    `protocol` is `rest` or `grpc`; `method` is `Predict`, `GetModelMetadata`,
    `GetModelStatus`, `Classify`, `Regress` or `MultiInference`. `Record` describes the
    other labels.
    """  # noqa: E501

    def __init__(self):
        self.registry = prometheus_client.CollectorRegistry()
        self._requests = prometheus_client.Counter(
            _PREFIX + "requests",
            "Requests answered.",
            ["protocol", "method", "model", "version", "signature", "status"],
            registry=self.registry,
        )
        self._seconds = prometheus_client.Histogram(
            _PREFIX + "request_seconds",
            "Seconds from the arrival of a request to its response.",
            ["protocol", "method", "model"],
            buckets=[b * 10.0**e for e in range(-4, 1) for b in (1, 2.5, 5)] + [10.0],
            registry=self.registry,
        )
        self._in_flight = prometheus_client.Gauge(
            _PREFIX + "requests_in_flight",
            "Requests in progress.",
            ["protocol"],
            registry=self.registry,
        )
        self._loaded = prometheus_client.Gauge(
            _PREFIX + "loaded_version",
            "1 for each served version.",
            ["model", "version"],
            registry=self.registry,
        )
        self._load_failures = prometheus_client.Counter(
            _PREFIX + "load_failures",
            "Versions that failed to load.",
            ["model"],
            registry=self.registry,
        )

    @contextlib.contextmanager
    def request(self, protocol, method):
        """Counts and times one request inside a `with` block.

        Args:
            protocol: str, `rest` or `grpc`.
            method: str, the name of the method in TensorFlow Serving's services.

        Yields:
            A `Record`; the block sets its attributes.
        """
        record = Record()
        in_flight = self._in_flight.labels(protocol)
        in_flight.inc()
        start = time.perf_counter()
        try:
            yield record
        finally:
            seconds = time.perf_counter() - start
            in_flight.dec()
            self._seconds.labels(protocol, method, record.model).observe(seconds)
            self._requests.labels(
                protocol,
                method,
                record.model,
                record.version,
                record.signature,
                record.status,
            ).inc()

    def loaded(self, model, version):
        """Records that a version is served."""
        self._loaded.labels(model, str(version)).set(1)

    def unloaded(self, model, version):
        """Records that a version is no longer served."""
        self._loaded.remove(model, str(version))

    def load_failed(self, model):
        """Records that a version failed to load."""
        self._load_failures.labels(model).inc()

    def text(self):
        """Formats the metrics for Prometheus.

        Returns:
            The text as bytes, and its content type.
        """
        content = prometheus_client.generate_latest(self.registry)
        return content, prometheus_client.CONTENT_TYPE_LATEST
