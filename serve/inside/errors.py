"""Why a request gets an error in place of its answer; the message goes to its client."""


class RequestError(ValueError):
    """A request that cannot be served as it is."""


class Full(Exception):
    """A queue has as many requests as it may hold; the client may try again."""


class Cancelled(Exception):
    """The client no longer waits for this request."""


class Expired(Cancelled):
    """The request's deadline has passed."""
