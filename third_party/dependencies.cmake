# Every C++ dependency, by name. Nothing is vendored: each comes from the system or from PyPI.
# A missing one is named with the command that installs it.

function(deltazip_require package hint)
  if(NOT ${package}_FOUND)
    message(FATAL_ERROR "DeltaZip needs ${package}. Install it with: ${hint}")
  endif()
endfunction()

find_package(Threads REQUIRED)

# One interpreter for the module, pybind11 and the headers that come from PyPI.
if(DELTAZIP_PYTHON)
  find_package(Python 3.10 COMPONENTS Interpreter Development.Module REQUIRED)
  set(DELTAZIP_INTERPRETER ${Python_EXECUTABLE})
else()
  find_package(Python3 COMPONENTS Interpreter QUIET)
  set(DELTAZIP_INTERPRETER ${Python3_EXECUTABLE})
endif()

# libcrypto: SHA-256. Linked statically where the archive is there, so that wheels carry it.
set(OPENSSL_USE_STATIC_LIBS TRUE)
find_package(OpenSSL COMPONENTS Crypto QUIET)
if(NOT OPENSSL_FOUND)
  set(OPENSSL_USE_STATIC_LIBS FALSE)
  find_package(OpenSSL COMPONENTS Crypto QUIET)
  if(OPENSSL_FOUND)
    message(STATUS "libcrypto.a not found: wheels will need the system's libcrypto.so")
  endif()
endif()
deltazip_require(OpenSSL "apt install libssl-dev (dnf install openssl-devel)")

# libzstd: deltas packed for disk and network. Statically, as libcrypto.
find_path(ZSTD_INCLUDE zstd.h)
find_library(ZSTD_LIBRARY NAMES libzstd.a zstd)
if(NOT ZSTD_INCLUDE OR NOT ZSTD_LIBRARY)
  message(FATAL_ERROR "DeltaZip needs zstd. Install it with: apt install libzstd-dev "
                      "(dnf install libzstd-devel)")
endif()
if(NOT ZSTD_LIBRARY MATCHES "\\.a$")
  message(STATUS "libzstd.a not found: wheels will need the system's libzstd.so")
endif()
add_library(deltazip_zstd INTERFACE)
add_library(deltazip::zstd ALIAS deltazip_zstd)
target_include_directories(deltazip_zstd SYSTEM INTERFACE ${ZSTD_INCLUDE})
target_link_libraries(deltazip_zstd INTERFACE ${ZSTD_LIBRARY})

# nlohmann-json, header-only: from PyPI inside `pip install .`, else from the system.
if(DELTAZIP_INTERPRETER)
  execute_process(
    COMMAND ${DELTAZIP_INTERPRETER} -c
            "import importlib.resources as r; print(r.files('nlohmann_json') / 'include')"
    OUTPUT_VARIABLE DELTAZIP_PYPI_JSON OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
find_path(NLOHMANN_JSON_INCLUDE nlohmann/json.hpp HINTS ${DELTAZIP_PYPI_JSON})
if(NOT NLOHMANN_JSON_INCLUDE)
  message(FATAL_ERROR "DeltaZip needs nlohmann-json. Install it with: pip install nlohmann-json "
                      "(or apt install nlohmann-json3-dev)")
endif()
add_library(deltazip_json INTERFACE)
add_library(deltazip::json ALIAS deltazip_json)
target_include_directories(deltazip_json SYSTEM INTERFACE ${NLOHMANN_JSON_INCLUDE})

if(DELTAZIP_TESTS)
  find_package(GTest QUIET)
  deltazip_require(GTest "apt install libgtest-dev (dnf install gtest-devel)")
endif()

if(DELTAZIP_PYTHON)
  execute_process(
    COMMAND ${DELTAZIP_INTERPRETER} -m pybind11 --cmakedir
    OUTPUT_VARIABLE DELTAZIP_PYPI_PYBIND11 OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  find_package(pybind11 3.0 QUIET CONFIG HINTS ${DELTAZIP_PYPI_PYBIND11})
  deltazip_require(pybind11 "pip install 'pybind11>=3'")
endif()
