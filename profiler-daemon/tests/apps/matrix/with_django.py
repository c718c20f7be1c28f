"""/wait/N in an asynchronous view, /burn/N in a synchronous one; `asgi` and `wsgi`. (Under WSGI /wait/N is synchronous too.)"""

import django
from django.conf import settings
from django.http import HttpResponse
from django.urls import path

import burning

settings.configure(
    SECRET_KEY="x",
    ALLOWED_HOSTS=["*"],
    ROOT_URLCONF=__name__,
    MIDDLEWARE=["django.middleware.common.CommonMiddleware"],
    LOGGING_CONFIG=None,
)
django.setup()


async def wait(request, number):
    len(request.body)
    return HttpResponse("done", headers=await burning.with_waits(number))


def burn(request, number):
    len(request.body)
    return HttpResponse("done", headers=burning.at_once(number))


urlpatterns = [path("wait/<int:number>", wait), path("burn/<int:number>", burn)]

from django.core.asgi import get_asgi_application  # noqa: E402
from django.core.wsgi import get_wsgi_application  # noqa: E402

asgi = get_asgi_application()
wsgi = get_wsgi_application()
