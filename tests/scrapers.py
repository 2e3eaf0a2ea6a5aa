"""What scrapers say in their `Accept` header: `scrape/scrape.go` of Prometheus by release."""

PLAIN = "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
ACCEPTS = {
    "Prometheus 2.42": (
        "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;"
        "q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
    ),
    "Prometheus 3": (
        "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
        "application/openmetrics-text;version=0.0.1;q=0.5,"
        f"text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,{PLAIN}"
    ),
    "Prometheus 3, metric_name_validation_scheme: legacy": (
        "application/openmetrics-text;version=1.0.0;escaping=underscores;q=0.6,"
        "application/openmetrics-text;version=0.0.1;q=0.5,"
        f"text/plain;version=1.0.0;escaping=underscores;q=0.4,{PLAIN}"
    ),
}
