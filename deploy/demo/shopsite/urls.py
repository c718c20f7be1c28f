"""All routes live in the one application."""

from django.urls import include, path

urlpatterns = [path("", include("shop.urls"))]
